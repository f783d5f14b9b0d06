"""The results of a run for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedgrove.report.owners import own_line
from fedgrove.report.stage_reports import report_of
from fedgrove.report.summary import Summary
from fedgrove.report.verdict import one_owner, own_texts, verdict
from fedgrove.report.words import size

MOST_COLUMNS = 5  # more clients than this share one column, the mean


def result_table(summary: Summary) -> Group:
    """The stages' tables, the table of perplexities, and sentences about quality and bytes."""
    parts: list[RenderableType] = [
        table for stage in summary.stages for table in report_of(stage.kind).result_tables(summary, stage)
    ]
    parts += [_perplexities(summary)] if summary.texts else []
    return Group(*parts, Text("\n".join(_lines(summary))))


def _perplexities(summary: Summary) -> Table:
    clients = sorted(summary.alone)
    one_column = len(clients) > (MOST_COLUMNS if not summary.centralized else MOST_COLUMNS - 2)
    table = Table(title="Perplexity on held-out text (lower is better)", title_justify="left")
    table.add_column("held-out text")
    table.add_column("dense", justify="right")
    if one_column:
        table.add_column("alone,\nmean", justify="right")
    else:
        for client in clients:
            table.add_column(Text(f"{client}\nalone"), justify="right")
    if summary.centralized:
        table.add_column("centralized", justify="right")
    table.add_column("federated", justify="right", style="bold green")

    def add(name: str, take: Callable[[dict[str, float]], float]) -> None:
        alone = [take(summary.alone[client]) for client in clients]
        if one_column:
            alone = [sum(alone) / len(alone)]
        pooled = [take(summary.centralized)] if summary.centralized else []
        values = (take(summary.dense), *alone, *pooled, take(summary.federated))
        table.add_row(Text(name), *(f"{value:.1f}" for value in values))

    for text in summary.texts:
        add(text, itemgetter(text))
    table.add_section()
    add("geometric mean", summary.mean)
    return table


def _lines(summary: Summary) -> list[str]:
    lines = [*verdict(summary)]
    lines += filter(None, (own_texts(summary), own_line(summary), one_owner(summary)))
    sent = max(summary.uplink.values(), default=0)
    if summary.dense_bytes:
        lines.append(f"Each client sent at most {size(sent)}, {sent / summary.dense_bytes:.2f} of what plain averaging sends.")
    if summary.packed_bytes is not None:
        ratio = summary.packed_bytes / summary.model_bytes
        lines.append(f"The model takes {size(summary.model_bytes)}; packed {size(summary.packed_bytes)} ({ratio:.2f}).")
    return lines


def measured_lines(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each text, task or "speed" with its measurements and their 95 % intervals."""
    lines = []
    for name, numbers in found.items():
        said = [_said(key, numbers) for key in numbers if key.rpartition(".")[2] not in ("low", "high")]
        lines.append(f"{name}: {', '.join(said)}")
    return lines


def _said(key: str, numbers: Mapping[str, float]) -> str:
    value = numbers[key]
    if key in ("disk", "memory"):
        return f"{key} {size(int(value))}"
    if key in ("tokens", "windows", "records"):
        return f"{int(value):,} {key}"
    unit = " tokens/s" if key in ("prefill", "decode") else ""
    digits = 1 if unit else 3
    around = f" ({numbers[f'{key}.low']:.{digits}f} to {numbers[f'{key}.high']:.{digits}f})" if f"{key}.low" in numbers else ""
    return f"{key} {value:.{digits}f}{unit}{around}"
