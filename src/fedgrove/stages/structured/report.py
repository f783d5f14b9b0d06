"""What the report, the terminal and the model card say about structured pruning: from its plan and ``structured.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedgrove.quantities import mebibytes
from fedgrove.report.sections import Figure, Paragraph, Section, Sheet
from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import Outcome, Stage, Summary
from fedgrove.report.terminal import client_table, fill, megabytes, seconds
from fedgrove.report.words import ratio

DID = "structurally pruned"
DOING = "structured pruning"
FILES = ("structured.json",)
TAGS: tuple[str, ...] = ()
CARD = "All blocks are narrower than those of the base model, by the same amount; `config.json` has their widths."


def describe(config: Mapping[str, Any]) -> str:
    """Such as "structured pruning of 25% of the channels and 50% of the heads, score fisher"."""
    shares = f"{config['channels']:.0%} of the channels and {config['heads']:.0%} of the heads"
    return f"structured pruning of {shares}, score {config['score']}"


def recipe(config: Mapping[str, Any]) -> str:
    """How much text each client uses."""
    return f"{config['samples']} windows of {config['length']} tokens from each client"


def limits(config: Mapping[str, Any]) -> str:
    return ""


def plan_table(plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
    """What is cut, and what the stage costs each client."""
    before, after = plan["parameters"]
    title = f"stage {plan['stage']}: structured pruning, score {config['score']}: {removed(plan)}"
    table = client_table(title, "client", "windows", "memory", "disk", "upload", "time")
    for client, assignment in plan["clients"].items():
        fill(
            table, client, str(assignment["samples"]), mebibytes(assignment["memory"]), mebibytes(assignment["disk"]),
            megabytes(assignment["upload"]), seconds(assignment["seconds"]),
        )  # fmt: skip
    says = f"The model goes from {before:,} to {after:,} weights ({after / before:.2f}). {other_type(plan['types'])}"
    return Group(table, Text(says.strip()))


def result_tables(stage: Stage) -> list[RenderableType]:
    return []


def outcome(stage: Stage, files: Mapping[str, Any]) -> Outcome:
    """The weights that are left."""
    result = files.get("structured.json")
    if not result:
        return Outcome()
    before, after = result["parameters"]
    left = f"which leaves {after / before:.1%} of the weights to store and to compute with"
    return Outcome(f"{removed(result)} were removed, {left}")


def figures(summary: Summary, stage: Stage) -> list[Figure]:
    """The weights that are left."""
    result = summary.files.get("structured.json")
    if not result:
        return []
    before, after = result["parameters"]
    return [Figure(f"{after / before:.1%}", "of the weights are left", f"{after:,} of {before:,}")]


def sections(summary: Summary, stage: Stage) -> list[Section]:
    """What was cut."""
    result = summary.files.get("structured.json")
    if not result:
        return []
    says = (
        "Whole channels of the MLPs and heads of the attention were removed: those that matter least to the loss on the "
        "clients’ text, the same number from every block, so that a plain config.json describes the model. Any program that "
        f"loads the model stores fewer weights and computes with fewer. {other_type(result['types'])}"
    )
    return [Section("width", "Narrower blocks", [Paragraph(says.strip()), Sheet(_widths(result))])]


def removed(plan: Mapping[str, Any]) -> str:
    """What every block of a model loses: "176 of 704 channels and 2 of 8 heads out of every block"."""
    before, after = plan["before"], plan["after"]
    parts = []
    for what, each in (("channels", 1), ("heads", plan["queries"])):
        if before[what] > after[what]:
            parts.append(f"{each * (before[what] - after[what]):,} of {each * before[what]:,} {what}")
    return f"{' and '.join(parts)} out of every block"


def other_type(types: Sequence[str]) -> str:
    """A sentence for the report if the result has another model type than the model before the stage; else empty."""
    before, after = types
    if before == after:
        return ""
    return (
        f"It is written as type {after}, because a configuration of type {before} cannot express this number of heads; the "
        "tensors and the computation are the same."
    )


def _widths(result: Mapping[str, Any]) -> Table:
    before, after, queries, whole = result["before"], result["after"], result["queries"], "{:,}".format
    rows = [
        ["MLP channels of a block", before["channels"], after["channels"]],
        ["heads of a block", queries * before["heads"], queries * after["heads"]],
        ["key-value heads of a block", before["heads"], after["heads"]],
        ["weights of the model", *result["parameters"]],
        ["bytes of the model", *result["bytes"]],
    ]
    columns = [Column(""), Column("before", whole), Column("after", whole), Column("left", "{:.3f}".format)]
    return Table("width", "Every block is cut by the same amount", columns, [[*row, ratio(row[2], row[1])] for row in rows])
