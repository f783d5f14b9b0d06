"""Formats numbers, lists and paths for people. Independent of runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath


def size(number: float) -> str:
    """Bytes as text, with decimal units: "3.4 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if number < 999.95 or (unit == "bytes" and number < 1000):
            return f"{number:,.0f} bytes" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} GB"


def change(ratio: float) -> str:
    """A ratio as a signed difference: 0.98 -> "−2.0%"."""
    percent = f"{100 * (ratio - 1):+.1f}%"
    return percent.replace("-", "−")


def compared(ratio: float) -> str:
    """A ratio in words: 0.98 -> "2.0% lower"."""
    return f"{abs(ratio - 1):.1%} {'lower' if ratio < 1 else 'higher'}"


def between(interval: tuple[float, float] | None) -> str:
    """An interval of a ratio in parentheses, to follow the ratio: (0.9, 1.1) -> " (−10.0% to +10.0%)"; "" for None."""
    return f" ({change(interval[0])} to {change(interval[1])})" if interval else ""


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def plural(number: int, noun: str) -> str:
    """1 -> "1 client", 2 -> "2 clients"; "matrix" becomes "matrices"; only the first word is changed."""
    one, *rest = noun.split(" ")
    several = " ".join(["matrices" if one == "matrix" else one + "s", *rest])
    return f"{number:,} {noun if number == 1 else several}"


def listed(words: Sequence[str], separator: str = ", ", last: str = " and ") -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return words[0] if len(words) == 1 else separator.join(words[:-1]) + last + words[-1] if words else ""


def capitalized(text: str) -> str:
    """The text with its first letter in upper case; unlike ``str.capitalize``, the rest is not changed."""
    return text[:1].upper() + text[1:]


def ratio(value: float | None, of: float | None) -> float | None:
    """``value / of``; None where one of them is missing or the quotient is undefined."""
    return value / of if value is not None and of else None


def file_name(path: str) -> str:
    """The last part of an absolute path, because folders can be private; anything else, such as a hub id, unchanged."""
    for flavor in (PurePosixPath(path), PureWindowsPath(path)):
        if flavor.is_absolute():
            return flavor.name
    return path


def shortened(name: str) -> str:
    """At most 24 characters of a name, because a page repeats it thousands of times."""
    return name if len(name) <= 24 else f"{name[:23]}…"
