"""Parts of the tables that a terminal shows of a plan."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

LEFT = frozenset({"client", "blocks", "has", "ranks"})  # columns of text


def client_table(title: str, *headings: str) -> Table:
    """An empty table, a column for each heading; text to the left, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LEFT else "right")
    return table


def fill(table: Table, *cells: str) -> None:
    """Adds a row; what looks like markup of rich in a name stays text."""
    table.add_row(*map(Text, cells))


def megabytes(number: float) -> str:
    """Bytes as "3.4 MB"."""
    return f"{number / 1e6:,.1f} MB"


def seconds(number: float, digits: int = 0) -> str:
    """Seconds as "1,200 s"."""
    return f"{number:,.{digits}f} s"
