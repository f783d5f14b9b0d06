"""The measurements of ``fedgrove export`` for each format, as numbers and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedgrove.report.words import change, size


def mean_ratio(one: Mapping[str, Any]) -> float | None:
    """The export's perplexity divided by the model's: geometric mean over texts with both; None if there are none."""
    ratios = [value / one["of_perplexity"][text] for text, value in one["perplexity"].items() if text in one["of_perplexity"]]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def mean_perplexity(one: Mapping[str, Any]) -> float | None:
    """The export's perplexity: geometric mean over the texts; None if it was not measured."""
    values = list(one["perplexity"].values())
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def export_table(exports: Sequence[Mapping[str, Any]]) -> Table:
    """For a terminal: bytes and perplexity of each reloaded export."""
    table = Table(title="Exports, reloaded and measured", title_justify="left")
    table.add_column("form")
    for heading in ("size", "of the model", "perplexity", "against the model"):
        table.add_column(heading, justify="right")
    for one in exports:
        value, ratio = mean_perplexity(one), mean_ratio(one)
        table.add_row(
            one["form"],
            size(one["bytes"]),
            f"{one['bytes'] / one['of_model']:.3f}",
            "not measured" if value is None else f"{value:.2f}",
            "–" if ratio is None else change(ratio),
        )
    return table
