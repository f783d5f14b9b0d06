"""Charts for the page: rows of marks with positions in percent, drawn as inline SVG.

Why no library: the page must be one small file, follow the reader's color scheme (light, dark, print), keep text
readable on a phone, and show numbers on hover without a script. Plotly, Bokeh and Vega need megabytes of script;
Matplotlib's images have a fixed size, fixed colors and no hover; pygal has no heat map. Positions in percent are enough
for all of this: an SVG without a view box stretches with its column, but its text and dots keep their size.

All marks are made with :meth:`markupsafe.Markup.format`, which escapes the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup


@dataclass(frozen=True)
class Row:
    """One row of a chart: its label on the left, its marks, and a value on the right."""

    label: str
    marks: Markup
    value: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        kind: "dots" and "bars" have their labels above the marks on a narrow screen, "heat" has them on the left.
        alt: a description for readers who cannot see the chart.
        rows: from top to bottom.
        axis: the labels below (dots, bars) or above (heat) the rows.
        legend: (class of the mark, its meaning).
    """

    kind: Literal["dots", "bars", "heat"]
    alt: str
    rows: Sequence[Row]
    axis: Markup = field(default=Markup(""))
    legend: Sequence[tuple[str, str]] = ()

    @property
    def dense(self) -> bool:
        """Whether rows are drawn with less height, because there are many."""
        return len(self.rows) > 24


@dataclass(frozen=True)
class Scale:
    """Maps numbers to percent of the width.

    >>> Scale.over([0.0, 7.3]).ticks
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """

    low: float
    high: float
    ticks: list[float]

    @classmethod
    def over(cls, values: Iterable[float]) -> Scale:
        """A scale with round ticks (four to eight, as a rule) that includes all values and zero."""
        numbers = [0.0, *values]
        low, high = min(numbers), max(numbers)
        rough = (high - low or 1.0) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(k for k in (1, 2, 5, 10) if power * k >= rough)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        last = max(last, first + 1)
        return cls(first * step, last * step, [k * step for k in range(first, last + 1)])

    def at(self, value: float) -> str:
        """The position of a number, such as "12.5%"."""
        return _percent((value - self.low) / (self.high - self.low))


def dot(scale: Scale, value: float, kind: str, title: str) -> Markup:
    """A dot that shows ``title`` on hover."""
    return Markup('<circle class="{}" cx="{}" cy="50%" r="5"><title>{}</title></circle>').format(kind, scale.at(value), title)


def square(scale: Scale, value: float, kind: str, title: str) -> Markup:
    """A square, which differs from a dot also without color."""
    return Markup(
        '<rect class="{}" x="{}" y="50%" width="9" height="9" transform="translate(-4.5 -4.5)"><title>{}</title></rect>'
    ).format(kind, scale.at(value), title)


def line(scale: Scale, low: float, high: float, kind: str, title: str = "") -> Markup:
    """A line from one number to another."""
    return Markup('<line class="{}" x1="{}" x2="{}" y1="50%" y2="50%"><title>{}</title></line>').format(
        kind, scale.at(low), scale.at(high), title
    )


def tick(scale: Scale, value: float, kind: str, title: str = "") -> Markup:
    """A vertical line at a number."""
    return Markup('<line class="{}" x1="{}" x2="{}" y1="0" y2="100%"><title>{}</title></line>').format(
        kind, scale.at(value), scale.at(value), title
    )


def bar(scale: Scale, value: float, kind: str, title: str) -> Markup:
    """A bar from zero to a number; the scale must begin at zero."""
    return Markup('<rect class="{}" y="18%" width="{}" height="64%"><title>{}</title></rect>').format(
        kind, scale.at(value), title
    )


def grid(scale: Scale) -> Markup:
    """Thin vertical lines at the ticks, a darker one at zero."""
    return Markup("").join(
        Markup('<line class="{}" x1="{}" x2="{}" y1="0" y2="100%"/>').format("zero" if value == 0 else "grid", x, x)
        for value, x in ((value, scale.at(value)) for value in scale.ticks)
    )


def tick_labels(scale: Scale, labels: Sequence[str]) -> Markup:
    """Labels at the ticks; the outermost are aligned to stay inside the chart."""
    last = len(labels) - 1
    return Markup("").join(
        Markup('<text x="{}" y="12" text-anchor="{}">{}</text>').format(
            scale.at(value), "start" if i == 0 else "end" if i == last else "middle", label
        )
        for i, (value, label) in enumerate(zip(scale.ticks, labels, strict=True))
    )


def cells(num_columns: int, filled: Mapping[int, tuple[float, str]]) -> Markup:
    """A row of a heat map.

    Args:
        num_columns: number of columns of the map.
        filled: by column, the opacity (0 to 1) and the text shown on hover; other columns stay empty.
    """
    width = _percent(1 / num_columns)
    return Markup("").join(
        Markup('<rect x="{}" width="{}" fill-opacity="{}"><title>{}</title></rect>').format(
            _percent(column / num_columns), width, f"{strength:.2g}", title
        )
        for column, (strength, title) in sorted(filled.items())
    )


def column_labels(labels: Sequence[str]) -> Markup:
    """Labels above the columns of a heat map; at most twelve, so of many only every second, fifth, …"""
    step = next(k for k in (1, 2, 5, 10, 20, 50, 100, len(labels)) if len(labels) / k <= 12)
    return Markup("").join(
        Markup('<text x="{}" y="12" text-anchor="middle">{}</text>').format(_percent((i + 0.5) / len(labels)), label)
        for i, label in enumerate(labels)
        if i % step == 0
    )


def runs(rows: Sequence[Iterable[int]]) -> str:
    """A small map as one SVG path with one stroke for each run of filled cells, which needs few bytes.

    >>> runs([[0, 1, 4], [2]])
    'M0 .5h2M4 .5h1M2 1.5h1'
    """
    path = []
    for y, columns in enumerate(rows):
        start, end = -1, -1
        for column in sorted(columns):
            if column != end:
                if end > start:
                    path.append((start, y, end - start))
                start = column
            end = column + 1
        if end > start:
            path.append((start, y, end - start))
    return "".join(f"M{x} {y or ''}.5h{length}" for x, y, length in path)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"
