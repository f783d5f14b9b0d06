"""What ``fedgrove route`` has measured, as numbers, as a table and in words."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fedgrove.evaluation.metrics import Measured
from fedgrove.evaluation.routing import Routing
from fedgrove.report.words import plural


def plain(found: Routing) -> dict[str, Any]:
    """Named numbers; ``NAME.low`` and ``NAME.high`` are the ends of a 95 % interval."""
    return {
        "records": found.records, "private": found.private, **found.small.plain("small"), **found.large.plain("large"),
        **({} if found.auroc is None else found.auroc.plain("auroc")),
        "escalated": [
            {
                "share": point.share, "below": point.below, **point.accuracy.plain("accuracy"), "random": point.random,
                **point.more.plain("more"),
            }
            for point in found.points
        ],
    }  # fmt: skip


def routing_table(found: Routing) -> Table:
    """For a terminal: a row for each share that is escalated."""
    title = f"Accuracy on {plural(found.records, 'record')} in %, with 95 % intervals"
    table = Table(title=title, title_justify="left")
    for heading in ("escalated", "if below", "accuracy", "if drawn", "difference"):
        table.add_column(heading, justify="right")
    table.add_row("none", "", _percent(found.small), "", "")
    for point in found.points:
        below = "" if point.below is None else f"{point.below:.2f}"
        at_random = f"{100 * point.random:.1f}"
        table.add_row(f"{point.share:.0%}", below, _percent(point.accuracy), at_random, _percent(point.more, "+"))
    return table


def verdict(found: Routing) -> list[str]:
    """In words: the large model alone, and whether the confidence can be used."""
    which = f"the {plural(found.records - found.private, 'record')} that may be escalated" if found.private else "all records"
    lines = [f"The large model alone, on {which}: {_percent(found.large)} %."]
    if found.auroc is None:
        return [*lines, "The small model gets all records right, or all wrong: its confidence cannot be judged."]
    score, low, high = found.auroc.value, found.auroc.low or 0.0, found.auroc.high or 1.0
    measured = f"AUROC {score:.2f} ({low:.2f} to {high:.2f}), where 0.5 is chance"
    if low <= 0.5 <= high:
        return [*lines, f"The small model's confidence does not tell where it is wrong ({measured}): do not route by it."]
    if high < 0.5:
        return [*lines, f"The small model is more confident where it is wrong ({measured}): do not route by it."]
    return [*lines, f"The small model is less confident where it is wrong ({measured})."]


def _percent(number: Measured, sign: str = "") -> str:
    value = f"{100 * number.value:{sign}.1f}"
    if number.low is None or number.high is None:
        return value
    return f"{value} ({100 * number.low:{sign}.0f} to {100 * number.high:{sign}.0f})"
