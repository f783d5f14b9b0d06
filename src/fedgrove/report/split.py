"""The result of ``fedgrove split``: the records of each client, as a table for a terminal and as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from rich.table import Table

from fedgrove.report import charts, sheet
from fedgrove.report.charts import Chart, Row, Scale
from fedgrove.report.sheet import render
from fedgrove.report.words import plural

MOST_LABELS = 40  # columns of the chart; rarer values share the last column
OTHERS = "others"


class Holding(Protocol):
    """See :class:`fedgrove.split.Holding`."""

    @property
    def name(self) -> str: ...
    @property
    def records(self) -> int: ...
    @property
    def characters(self) -> int: ...
    @property
    def labels(self) -> dict[str, int]: ...


def holdings_table(holdings: Sequence[Holding]) -> Table:
    """A row for each client: records, characters, and the most frequent values of the field."""
    table = Table(title="Who holds what", title_justify="left")
    labelled = any(holding.labels for holding in holdings)
    for heading in ("client", "records", "share", "characters", *(["values", "the most frequent"] if labelled else [])):
        table.add_column(heading, justify="left" if heading in ("client", "the most frequent") else "right")
    total = sum(holding.records for holding in holdings)
    for holding in holdings:
        row = [holding.name, f"{holding.records:,}", f"{holding.records / total:.0%}", f"{holding.characters:,}"]
        if labelled:
            first = sorted(holding.labels.items(), key=lambda pair: (-pair[1], pair[0]))[:3]
            row += [
                str(len(holding.labels)),
                ", ".join(
                    f"{label} {number / holding.records:.0%}" if len(holding.labels) > 1 else label for label, number in first
                ),
            ]
        table.add_row(*row)
    return table


def holdings_page(holdings: Sequence[Holding], title: str) -> str:
    """One self-contained HTML page: a heat map of clients by values (without a field: bars), and a table."""
    columns = _columns(holdings)
    says = "Records of each client."
    if columns:
        says = "The stronger the color, the more of the client’s records; the number on the right is their total. Columns: "
        says += ", ".join(f"{number} {column}" for number, column in enumerate(columns, 1)) + "."
    return render(
        "split.html",
        page_name="split",
        title=title,
        picture=_map(holdings, columns) if columns else _bars(holdings),
        says=says,
        holdings=_table(holdings),
        by_value=_by_value(holdings) if columns else None,
        plural=plural,
    )


def _table(holdings: Sequence[Holding]) -> sheet.Table:
    whole, total = "{:,}".format, sum(holding.records for holding in holdings)
    columns = [sheet.Column("client"), sheet.Column("records", whole), sheet.Column("share", "{:.1%}".format)]
    columns += [sheet.Column("characters", whole), sheet.Column("values", whole)]
    rows = [[h.name, h.records, h.records / total, h.characters, len(h.labels)] for h in holdings]
    labelled = any(h.labels for h in holdings)
    columns, rows = (columns, rows) if labelled else (columns[:-1], [row[:-1] for row in rows])
    return sheet.Table("holdings", "Records and characters of each client", columns, rows)


def _by_value(holdings: Sequence[Holding]) -> sheet.Table:
    """Records of each client by value, for all values; used as CSV only."""
    values = sorted({label for holding in holdings for label in holding.labels})
    rows = [[h.name, *(h.labels.get(value, 0) for value in values)] for h in holdings]
    return sheet.Table("values", "", [sheet.Column("client"), *map(sheet.Column, values)], rows)


def _counts(holding: Holding, values: Sequence[str]) -> dict[str, int]:
    here = dict.fromkeys(values, 0)
    for label, number in holding.labels.items():
        here[label if label in here else OTHERS] += number
    return here


def _columns(holdings: Sequence[Holding]) -> list[str]:
    counts = Counter[str]()
    for holding in holdings:
        counts.update(holding.labels)
    frequent = {label for label, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_LABELS]}
    return sorted(frequent) + ([OTHERS] if len(counts) > len(frequent) else [])


def _map(holdings: Sequence[Holding], columns: Sequence[str]) -> Chart:
    rows = []
    for holding in holdings:
        here = _counts(holding, columns)
        strongest = max(here.values())
        filled = {
            column: (0.1 + 0.9 * number / strongest, f"{holding.name}, {label}: {number:,} records")
            for column, (label, number) in enumerate(here.items())
            if number
        }
        rows.append(Row(holding.name, charts.cells(len(columns), filled), f"{holding.records:,}"))
    alt = "Values (columns) that each client (rows) holds: " + "; ".join(f"{h.name} {len(h.labels)}" for h in holdings) + "."
    return Chart("heat", alt, rows, charts.column_labels([str(number) for number in range(1, len(columns) + 1)]))


def _bars(holdings: Sequence[Holding]) -> Chart:
    scale = Scale.over([float(holding.records) for holding in holdings])
    rows = [
        Row(h.name, charts.bar(scale, h.records, "strong", f"{h.name}: {h.records:,} records"), f"{h.records:,}")
        for h in holdings
    ]
    alt = "Records of each client: " + ", ".join(f"{row.label} {row.value}" for row in rows) + "."
    return Chart("bars", alt, rows)
