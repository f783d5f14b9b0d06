"""Who holds what, after a split: a table for a terminal and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from markupsafe import Markup
from rich.table import Table

from fedgrove.report import charts
from fedgrove.report.charts import Chart, Row, Scale

MOST_LABELS = 40  # columns of the picture; the rarer values share the last one
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
    """A row for each client: records, characters, and the values of the field that it has the most of."""
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
    """One self-contained HTML page: a map of clients by values where there are values, else a bar for each client."""
    columns = _columns(holdings)
    chart = _map(holdings, columns) if columns else _bars(holdings)
    rows = [_ROW.format(row.label, row.label, row.marks, row.value) for row in chart.rows]
    says = "Records of each client."
    if columns:
        rows.insert(0, _ROW.format("", "", chart.axis, ""))
        says = "A stronger colour: more of the client’s records; the number at the end counts them all. The columns: "
        says += ", ".join(f"{number} {column}" for number, column in enumerate(columns, 1)) + "."
    return str(_PAGE.format(title, title, says, chart.kind, chart.alt, Markup("\n").join(rows)))


def _columns(holdings: Sequence[Holding]) -> list[str]:
    counts = Counter[str]()
    for holding in holdings:
        counts.update(holding.labels)
    frequent = {label for label, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_LABELS]}
    return sorted(frequent) + ([OTHERS] if len(counts) > len(frequent) else [])


def _map(holdings: Sequence[Holding], columns: Sequence[str]) -> Chart:
    rows = []
    for holding in holdings:
        here: Counter[str] = Counter()
        for label, number in holding.labels.items():
            here[label if label in columns else OTHERS] += number
        strongest = max(here.values())
        filled = {
            columns.index(label): (0.1 + 0.9 * number / strongest, f"{holding.name}, {label}: {number:,} records")
            for label, number in here.items()
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


_ROW = Markup('<div class="row"><span class="label" title="{}">{}</span><svg>{}</svg><span class="value">{}</span></div>')
_PAGE = Markup("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fdfdfb; --ink: #1a211d; --soft: #56615b; --faint: #f1f4f1; --grove: #1d6b47; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #131715; --ink: #e4e9e6; --soft: #a2ada6; --faint: #1b211e; --grove: #6ac79a; }}
}}
html {{ background: var(--paper); color: var(--ink); font: .9rem/1.5 system-ui, sans-serif; }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
p, .value {{ color: var(--soft); }}
.row {{ display: grid; grid-template-columns: minmax(4rem, 8rem) minmax(0, 1fr) 3.5rem; gap: 0 .9rem; align-items: center; }}
.label {{ overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
.value {{ text-align: right; font-variant-numeric: tabular-nums; }}
svg {{ width: 100%; height: 1.5rem; display: block; }}
svg text {{ font-size: .7rem; fill: var(--soft); }}
.heat .row svg:has(rect) {{ background: var(--faint); }}
.heat rect {{ height: 100%; fill: var(--grove); stroke: var(--paper); }}
rect.strong {{ fill: var(--grove); }}
@media print {{ * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }} .row {{ break-inside: avoid; }} }}
</style>
</head>
<body>
<h1>{}</h1>
<p>{}</p>
<div class="{}" role="img" aria-label="{}">
{}
</div>
</body>
</html>
""")
