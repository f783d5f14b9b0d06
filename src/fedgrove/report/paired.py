"""Confidence intervals for the difference of two models, measured on the same windows (paired bootstrap)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedgrove.evaluation.metrics import Parts, interval, resampled

Interval = tuple[float, float]
Examples = Mapping[str, Parts]  # of one model, by text


def ratio_interval(over: Sequence[Examples], under: Sequence[Examples], texts: Sequence[str]) -> Interval | None:
    """The 95 % interval of the mean perplexity of models divided by that of others, each a geometric mean over texts.

    Args:
        over: of each of the models, (loss, tokens) of each window, by text.
        under: likewise of the models to divide by.
        texts: the texts to use.

    Returns:
        None if it cannot be computed: the run is of an older fedgrove, or a text has only one window.
    """
    drawn = _drawn([*over, *under], texts)
    if not drawn or not under:
        return None
    perplexities = np.exp(drawn)
    return interval(perplexities[: len(over)].mean(axis=0) / perplexities[len(over) :].mean(axis=0))


def difference_interval(after: Examples, before: Examples, name: str) -> Interval | None:
    """The 95 % interval of a measure of one model minus that of another; None if it cannot be computed."""
    drawn = _drawn([after, before], [name])
    return interval(drawn[0] - drawn[1]) if drawn else None


def unclear(between: Interval | None, none: float = 1.0) -> bool:
    """Whether the difference is not significant: the interval includes ``none``, the value for no difference."""
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
