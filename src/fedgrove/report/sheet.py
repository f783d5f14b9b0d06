"""Tables of a page, shown and offered as CSV files; and the rendering of the pages' templates."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2

LONG = 30  # a table with more rows is folded


class Spread(NamedTuple):
    """A number with its interval, and its text on the page: the number, and in small print below it the interval."""

    value: float
    low: float | None
    high: float | None
    said: str
    around: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and a function that formats a value. Without ``show`` values are text.

    ``spread``: its values are :class:`Spread`, which become three columns of the CSV file.
    """

    title: str
    show: Callable[[Any], str] | None = None
    spread: bool = False

    @property
    def textual(self) -> bool:
        """Whether its values are text, which is aligned to the left."""
        return self.show is None and not self.spread

    def text(self, value: Any) -> str:
        """A value as the page shows it; the CSV file has it in full precision."""
        if value is None:
            return "–"
        if isinstance(value, Spread):
            return value.said
        return self.show(value) if self.show else str(value)


@dataclass(frozen=True)
class Table:
    """A table of the page and of a CSV file. The first column names the row."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    foot: Sequence[Sequence[Any]] = field(default=())

    @property
    def folded(self) -> bool:
        """Whether the table is collapsed until the reader opens it."""
        return len(self.rows) > LONG

    @property
    def link(self) -> str:
        """The table as a data URI with CSV (RFC 4180), numbers in full precision."""
        text = io.StringIO()
        writer = csv.writer(text)
        titles = [[c.title, f"{c.title}: low", f"{c.title}: high"] if c.spread else [c.title] for c in self.columns]
        writer.writerow(title for of_column in titles for title in of_column)
        for row in (*self.rows, *self.foot):
            cells = [self._cells(column, value) for column, value in zip(self.columns, row, strict=True)]
            writer.writerow(_harmless(value) for of_column in cells for value in of_column)
        return "data:text/csv;charset=utf-8," + quote(text.getvalue(), safe="!$&()*+,-./:;=?@_~")

    @staticmethod
    def _cells(column: Column, value: Any) -> Sequence[Any]:
        if not column.spread:
            return [value]
        return value[:3] if value is not None else [None] * 3


def _harmless(value: Any) -> Any:
    """Quotes a text that a spreadsheet would otherwise interpret as a formula."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def render(template: str, **values: Any) -> str:
    """Fills one of the templates in this folder; values are escaped."""
    return _environment().get_template(template).render(values)


@cache  # an environment keeps its templates, and to compile one takes longer than to fill it
def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(lambda name: (files("fedgrove.report") / name).read_text(encoding="utf-8"))
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
