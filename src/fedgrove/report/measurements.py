"""The page's tables of other measurements: before and after the run, generated samples, sizes, and exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedgrove.report.exports import mean_perplexity, mean_ratio
from fedgrove.report.paired import difference_interval, unclear
from fedgrove.report.sheet import Column, Spread, Table
from fedgrove.report.summary import Summary
from fedgrove.report.words import change, ratio, size


def sizes(summary: Summary) -> Table:
    """Bytes of the model on disk."""
    rows: list[list[Any]] = [["plain safetensors (model/)", summary.model_bytes, 1.0]]
    if summary.packed_bytes is not None:
        rows.append(["packed (packed/)", summary.packed_bytes, ratio(summary.packed_bytes, summary.model_bytes)])
    caption = f"Size on disk: {summary.parameters:,} weights"
    caption += f", {summary.zeros:,} of them pruned to zero" if summary.pruned_weights else ""
    return Table("size", caption, [Column("form"), Column("bytes", "{:,}".format), Column("of plain", "{:.3f}".format)], rows)


def exports(summary: Summary) -> Table | None:
    """Every export in the run folder: bytes, and perplexity of the reloaded export."""
    if not summary.exports:
        return None
    columns = [Column("form"), Column("bytes", size), Column("of the model", "{:.3f}".format), Column("texts", "{:,}".format)]
    columns += [Column("perplexity", "{:.2f}".format), Column("against the model", change)]
    rows = [
        [
            one["form"],
            one["bytes"],
            one["bytes"] / one["of_model"],
            len(one["perplexity"]),
            mean_perplexity(one),
            mean_ratio(one),
        ]
        for one in summary.exports
    ]
    return Table("exports", "Exports, reloaded and measured", columns, rows)


def measures(summary: Summary) -> Table | None:
    """All measurements of the model other than perplexity, with intervals if there are any."""
    stages = [None, *range(len(summary.stages))]
    ends = (".low", ".high")

    def of(stage: int | None, name: str) -> Spread | None:
        return _spread(name, lambda one: summary.rounds_measured.get((stage, None, None, one)))

    names = [name for _, round_, client, name in summary.rounds_measured
             if "/" in name and round_ is None and client is None and not name.partition("/")[0].endswith(ends)]  # fmt: skip
    rows: list[list[Any]] = []
    pooled = any(name in summary.centralized_measured for name in names)
    used = [stage for stage in stages if stage in (None, summary.last) or any(of(stage, name) for name in names)]
    for name in dict.fromkeys(names):
        measure, _, text = name.partition("/")
        values = [of(stage, name) for stage in used]
        row = [f"{text}: {measure}", *values]
        row += [_spread(name, summary.centralized_measured.get)] if pooled else []
        before, after = values[0], values[-1]
        difference = quotient = None
        if before and after:
            quotient = ratio(after.value, before.value)
            old, new = (summary.examples.get((stage, None), {}) for stage in (None, summary.last))
            interval = difference_interval(new, old, name)
            if interval:
                low, high = interval
                signed = [f"{value:+.3f}".replace("-", "−") for value in (after.value - before.value, low, high)]
                around = f"{signed[1]} to {signed[2]}" + (", not clear" if unclear(interval, 0.0) else "")
                difference = Spread(after.value - before.value, low, high, signed[0], around)
        rows.append([*row, quotient, difference])
    titles = {None: "before", summary.last: "after"}
    columns = [Column("what"), *(Column(titles.get(stage, f"after stage {stage}"), spread=True) for stage in used)]
    columns += [Column("centralized", spread=True)] if pooled else []
    columns.append(Column("after against before", change))
    if any(row[-1] for row in rows):
        columns.append(Column("difference", spread=True))
    rows = [row[: len(columns)] for row in rows]
    return Table("measures", "Measured before and after", columns, rows) if rows else None


def _spread(name: str, take: Callable[[str], float | None]) -> Spread | None:
    """A measurement and its interval, in its unit."""
    measure, _, text = name.partition("/")
    value, low, high = take(name), take(f"{measure}.low/{text}"), take(f"{measure}.high/{text}")
    if value is None:
        return None
    if measure in ("disk", "memory"):
        return Spread(value, low, high, size(value))
    digits, unit = (1, " tokens/s") if measure in ("prefill", "decode") else (3, "")
    around = f"{low:,.{digits}f} to {high:,.{digits}f}" if low is not None and high is not None else ""
    return Spread(value, low, high, f"{value:,.{digits}f}{unit}", around)


def samples(summary: Summary) -> Table:
    """The generated samples; used as CSV only."""
    rows = [[sample["prompt"], sample["before"], sample["after"]] for sample in summary.samples]
    return Table("samples", "", [Column("prompt"), Column("before"), Column("after")], rows)
