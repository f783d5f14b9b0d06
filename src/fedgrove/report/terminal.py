"""Helpers for the tables of a plan on a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

LEFT = frozenset({"client", "blocks", "has", "ranks"})  # columns of text, aligned to the left


def client_table(title: str, *headings: str) -> Table:
    """An empty table with a column for each heading."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LEFT else "right")
    return table


def fill(table: Table, *cells: str) -> None:
    """Adds a row of plain text, so that rich does not interpret names as markup."""
    table.add_row(*map(Text, cells))


def megabytes(number: float) -> str:
    """Bytes as "3.4 MB"."""
    return f"{number / 1e6:,.1f} MB"


def seconds(number: float, digits: int = 0) -> str:
    """Seconds as "1,200 s"."""
    return f"{number:,.{digits}f} s"
