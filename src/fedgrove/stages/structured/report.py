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
FOLDERS: tuple[str, ...] = ()
TAGS: tuple[str, ...] = ()
CARD = (
    "It has fewer blocks than the base model, or narrower ones, or fewer experts; `config.json` has their numbers and widths."
)


def describe(config: Mapping[str, Any]) -> str:
    """Such as "structured pruning of 25% of the channels and 50% of the heads, score fisher"."""
    if config.get("experts"):
        return f"structured pruning of {config['experts']:.0%} of the experts, score {config['expert_score']}"
    shares = [f"{config[key]:.0%} of the {key}" for key in ("channels", "heads")] if _narrows(config) else []
    if config["depth"]:
        shares.append(f"{config['depth']:.0%} of the blocks")
    return f"structured pruning of {joined(shares)}{_score(config)}{_repaired(config)}"


def recipe(config: Mapping[str, Any]) -> str:
    """How much text each client uses."""
    return f"{config['samples']} windows of {config['length']} tokens from each client"


def limits(config: Mapping[str, Any]) -> str:
    return ""


def plan_table(plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
    """What is cut, and what the stage costs each client."""
    before, after = plan["parameters"]
    title = f"stage {plan['stage']}: structured pruning{_score(config)}{_repaired(config)}: {removed(plan)}"
    table = client_table(title, "client", "windows", "memory", "disk", "upload", "time")
    for client, assignment in plan["clients"].items():
        fill(
            table, client, str(assignment["samples"]), mebibytes(assignment["memory"]), mebibytes(assignment["disk"]),
            megabytes(assignment["upload"]), seconds(assignment["seconds"]),
        )  # fmt: skip
    says = f"The model goes from {before:,} to {after:,} weights ({after / before:.2f}). {other_type(plan['types'])}"
    return Group(table, Text(says.strip()))


def result_tables(summary: Summary, stage: Stage) -> list[RenderableType]:
    return []


def outcome(stage: Stage, files: Mapping[str, Any]) -> Outcome:
    """The weights that are left."""
    result = files.get("structured.json")
    if not result:
        return Outcome()
    before, after = result["parameters"]
    left = f"which leaves {after / before:.1%} of the weights to store and to compute with"
    is_one = not _narrows(result) and len(result["kept_blocks"]) == result["num_blocks"][0] - 1
    return Outcome(f"{removed(result)} {'was' if is_one else 'were'} removed, {left}")


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
    parts: list[Paragraph | Sheet] = []
    if _narrows(result):
        says = (
            "Whole channels of the MLPs and heads of the attention were removed: those that matter least to the loss on the "
            "clients’ text, the same number from every block, so that a plain config.json describes the model."
        )
        parts.append(Paragraph(says))
    if result["depth"]:
        gone = [str(block + 1) for block in range(result["num_blocks"][0]) if block not in result["kept_blocks"]]
        these = f"Block {gone[0]} was" if len(gone) == 1 else f"Blocks {joined(gone)} were"
        parts.append(Paragraph(f"{these} removed: the hidden states of the clients’ text change least there."))
    if _num_experts(result) is not None:
        parts.append(Paragraph(_experts_gone(result)))
    errors = [how["error"] for block in result["blocks"] for how in block.get("repair", {}).values()]
    if errors:
        says = (
            "The matrices that read what was removed were solved for anew, by sums over the clients’ text, to make up for it. "
            f"On text that a solution had not seen, {1 - sum(errors) / len(errors):.0%} of the squared error in their outputs "
            f"was undone, from {1 - max(errors):.0%} to {1 - min(errors):.0%} in a matrix."
        )
        parts.append(Paragraph(says))
    says = "Any program that loads the model stores fewer weights and computes with fewer. " + other_type(result["types"])
    parts.append(Paragraph(says.strip()))
    title = "Fewer experts" if _num_experts(result) is not None else "Fewer or narrower blocks"
    return [Section("width", title, [*parts, Sheet(_sizes(result))])]


def removed(plan: Mapping[str, Any]) -> str:
    """What a model loses: "176 of 704 channels and 2 of 8 heads out of every block, and 1 of 6 blocks".

    Of a mixture of experts: "4 of 8 experts out of every block that has any". Of a plan, or of the result.
    """
    number = _num_experts(plan)
    if number is not None:
        return f"{number[0] - number[1]:,} of {number[0]:,} experts out of every block that has any"
    before, after = plan["before"], plan["after"]
    if before is None:  # of a mixture of experts, blocks
        return _blocks(plan)
    parts = []
    for what, each in (("channels", 1), ("heads", plan["queries"])):
        if before[what] > after[what]:
            parts.append(f"{each * (before[what] - after[what]):,} of {each * before[what]:,} {what}")
    narrower = f"{joined(parts)} out of every block" if parts else ""
    return ", and ".join(part for part in (narrower, _blocks(plan)) if part)


def joined(parts: Sequence[str]) -> str:
    """A list in words: "a, b and c"."""
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def _blocks(plan: Mapping[str, Any]) -> str:
    """Such as "1 of 6 blocks"; empty if all stay. Of a plan, or of the result."""
    number, left = plan["num_blocks"] if "kept_blocks" in plan else (plan["num_blocks"], plan["blocks_left"])
    return f"{number - left} of {number} blocks" if left < number else ""


def _num_experts(plan: Mapping[str, Any]) -> tuple[int, int] | None:
    """The number of experts of a block, before and after; None: they all stay. Of a plan, or of the result."""
    if "kept_blocks" in plan:
        before_and_after = plan.get("num_experts")
    else:
        cut = plan.get("experts")
        before_and_after = cut and (cut["before"], cut["after"])
    return before_and_after and (before_and_after[0], before_and_after[1])


def _narrows(config: Mapping[str, Any]) -> bool:
    return bool(config["channels"] or config["heads"])


def _score(config: Mapping[str, Any]) -> str:
    """Blocks have no score that can be chosen."""
    if config.get("experts"):
        return f", score {config['expert_score']}"
    return f", score {config['score']}" if _narrows(config) else ""


def other_type(types: Sequence[str]) -> str:
    """A sentence for the report if the result has another model type than the model before the stage; else empty."""
    before, after = types
    if before == after:
        return ""
    return (
        f"It is written as type {after}, because a configuration of type {before} cannot express this number of heads; the "
        "tensors and the computation are the same."
    )


def _repaired(config: Mapping[str, Any]) -> str:
    return ", repaired" if config.get("repair") and _narrows(config) else ""


def _experts_gone(result: Mapping[str, Any]) -> str:
    """What was cut, and how much of the router's work that was."""
    routed = [block["routed"] for block in result["blocks"] if "routed" in block]
    return (
        "Whole experts were removed: those with the lowest scores on the clients’ text, the same number from every block that "
        f"has any. The router had sent {sum(routed) / len(routed):.0%} of its choices there, from {min(routed):.0%} to "
        f"{max(routed):.0%} in a block; it now chooses among those that are left."
    )


def _sizes(result: Mapping[str, Any]) -> Table:
    rows = [["blocks", *result["num_blocks"]]]
    if result["before"] is not None:
        before, after, queries = result["before"], result["after"], result["queries"]
        rows += [
            ["MLP channels of a block", before["channels"], after["channels"]],
            ["heads of a block", queries * before["heads"], queries * after["heads"]],
            ["key-value heads of a block", before["heads"], after["heads"]],
        ]
    if _num_experts(result) is not None:
        rows.append(["experts of a block", *result["num_experts"]])
    rows += [["weights of the model", *result["parameters"]], ["bytes of the model", *result["bytes"]]]
    whole = "{:,}".format
    columns = [Column(""), Column("before", whole), Column("after", whole), Column("left", "{:.3f}".format)]
    title = "All blocks have the same widths"
    if result["before"] is None:
        title = "All blocks have as many experts" if _num_experts(result) is not None else "Blocks are as wide as before"
    return Table("width", title, columns, [[*row, ratio(row[2], row[1])] for row in rows])
