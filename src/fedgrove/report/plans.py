"""A stage's plan as a table for a terminal: what each client was given, and by what it has, why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedgrove.quantities import mebibytes
from fedgrove.report.words import narrower, other_type, ranges


def plan_table(plan: Mapping[str, Any], stage: Mapping[str, Any]) -> Group:
    """A plan as it stands in ``RUN/plan-N-KIND.json``, and its stage as it stands in ``RUN/job.toml``."""
    if plan["kind"] == "structured":
        return _narrowing(plan, stage)
    return _tuning(plan) if plan["kind"] == "tune" else _pruning(plan, stage)


def _narrowing(plan: Mapping[str, Any], stage: Mapping[str, Any]) -> Group:
    before, after = plan["parameters"]
    table = _table(f"stage {plan['stage']}: narrow, score {stage['score']}: {narrower(plan)}")
    _columns(table, "client", "windows", "memory", "disk", "upload", "time")
    for name, share in plan["clients"].items():
        table.add_row(
            name, str(share["samples"]), mebibytes(share["memory"]), mebibytes(share["disk"]), _megabytes(share["upload"]),
            f"{share['seconds']:,.0f} s",
        )  # fmt: skip
    says = f"The model goes from {before:,} to {after:,} weights ({after / before:.2f}). {other_type(plan['types'])}"
    return Group(table, Text(says.strip()))


def _pruning(plan: Mapping[str, Any], stage: Mapping[str, Any]) -> Group:
    table = _table(f"stage {plan['stage']}: prune, {stage['pruner']}, aggregation {stage['aggregation']}")
    _columns(table, "client", "blocks", "windows", "target", "memory", "upload", "time")
    for name, share in plan["clients"].items():
        blocks = "; ".join(ranges(numbers) for numbers in share["blocks"])
        target = stage.get("pattern") or f"{share['sparsity']:.0%}"
        table.add_row(
            name, f"{blocks} of {plan['num_blocks']}", str(share["samples"]), target, mebibytes(share["memory"]),
            _megabytes(share["upload"]), f"{share['seconds']:,.0f} s",
        )  # fmt: skip
    return Group(table)


def _tuning(plan: Mapping[str, Any]) -> Group:
    deadline = f", deadline {plan['deadline']:.3g} s" if plan["deadline"] else ""
    table = _table(
        f"stage {plan['stage']}: tune, {plan['parametrization'] if plan['planner'] == 'uniform' else plan['planner']}{deadline}; each client, in a round"
    )
    _columns(table, "client", "has", "bits", "batch", "ranks", "memory", "upload", "time")
    for name, share in plan["clients"].items():
        card = plan["capabilities"][name]
        has = [mebibytes(card["memory"])] if card["memory"] else []
        has += [f"speed {card['speed']:g}"]
        has += [f"{card['uplink'] / 1e6:,.0f} Mbit up"] if card["uplink"] else []
        at_once = f" ({share['micro']} at once)" if share["micro"] < share["batch"] else ""
        ranks = _ranks(share["ranks"], len(plan["importance"]))
        table.add_row(
            name, ", ".join(has), str(share["bits"]), f"{share['batch']}{at_once}", ranks,
            mebibytes(share["memory"]), _megabytes(share["upload"]), f"{share['seconds']:,.1f} s",
        )  # fmt: skip
    left_out = [Text(f"{name} is left out: {why}") for name, why in sorted(plan["left_out"].items())]
    total = Text(f"All rounds together take {plan['total']:,.1f} s of the clients' own time, as modelled from what they say.")
    return Group(table, total, *left_out)


def _ranks(ranks: Mapping[str, int], linears: int) -> str:
    """{a: 8, b: 8, c: 2} of 4 linears -> "8 in 2, 2 in 1, none in 1"."""
    if not ranks:
        return "whole linears"
    values = list(ranks.values())
    parts = [f"{rank} in {values.count(rank)}" for rank in sorted(set(values), reverse=True)]
    return ", ".join(parts + ([f"none in {linears - len(values)}"] if len(values) < linears else []))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")


def _columns(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("client", "blocks", "has", "ranks") else "right")


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"
