"""A table of a page: shown, and offered as a CSV file; and the pages' templates."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import jinja2

LONG = 30  # a table with more rows is folded


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and how a value is shown. Without ``show`` it is text."""

    title: str
    show: Callable[[Any], str] | None = None

    def text(self, value: Any) -> str:
        """A value as the page shows it; the CSV has it in full."""
        if value is None:
            return "–"
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
        writer.writerow(column.title for column in self.columns)
        writer.writerows([_harmless(value) for value in row] for row in (*self.rows, *self.foot))
        return "data:text/csv;charset=utf-8," + quote(text.getvalue(), safe="!$&()*+,-./:;=?@_~")


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
