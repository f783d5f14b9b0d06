"""How sure a comparison of two models is: intervals of what lies between them, on the very same text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedgrove.evaluation.metrics import Parts, interval, resampled

Interval = tuple[float, float]
Examples = Mapping[str, Parts]  # of one model, by text


def ratio_interval(over: Examples, under: Sequence[Examples], texts: Sequence[str]) -> Interval | None:
    """95 % of: the perplexity of one model, divided by the mean over others, each the geometric mean over texts.

    None where it is not known: in runs of an older fedgrove, or with one window of a text.
    """
    drawn = _drawn([over, *under], texts)
    if not drawn or not under:
        return None
    first, *others = (np.exp(values) for values in drawn)
    return interval(first / np.mean(others, axis=0))


def difference_interval(after: Examples, before: Examples, name: str) -> Interval | None:
    """95 % of: the mean of a measure of one model, less that of another."""
    drawn = _drawn([after, before], [name])
    return interval(drawn[0] - drawn[1]) if drawn else None


def unclear(between: Interval | None, none: float = 1.0) -> bool:
    """Whether there may be no difference: the interval holds ``none``."""
    return between is not None and between[0] <= none <= between[1]


def _drawn(models: Sequence[Examples], texts: Sequence[str]) -> list[np.ndarray]:
    tables: list[dict[int, Parts]] = []
    for text in texts:
        losses = [model.get(text, ()) for model in models]
        same = len({tuple(number for _, number in parts) for parts in losses}) == 1
        if len(losses[0]) < 2 or not same:
            return []
        tables.append(dict(enumerate(losses)))
    drawn = resampled(tables)
    return [drawn[i] for i in range(len(models))] if drawn else []
