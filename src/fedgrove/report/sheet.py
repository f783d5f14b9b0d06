"""A table of a page: shown, and offered as a CSV file; and the pages' templates."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2

LONG = 30  # a table with more rows is folded


class Spread(NamedTuple):
    """A number with the ends of its interval, and how the page says it: in large, and below it in small."""

    value: float
    low: float | None
    high: float | None
    said: str
    around: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and how a value is shown. Without ``show`` it is text.

    ``spread``: its values are :class:`Spread`, and three columns of the CSV file.
    """

    title: str
    show: Callable[[Any], str] | None = None
    spread: bool = False

    @property
    def textual(self) -> bool:
        """Whether its values are text, to be set to the left."""
        return self.show is None and not self.spread

    def text(self, value: Any) -> str:
        """A value as the page shows it; the CSV has it in full."""
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
        """Whether the page shows it only when asked."""
        return len(self.rows) > LONG

    @property
    def link(self) -> str:
        """The table as a data URI. CSV as in RFC 4180, numbers in full."""
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
    """Keeps a spreadsheet from taking a name for a formula."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def render(template: str, **values: Any) -> str:
    """Fills one of the templates that lie beside this file; names of people are escaped."""
    loader = jinja2.FunctionLoader(lambda name: (files("fedgrove.report") / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(values)
