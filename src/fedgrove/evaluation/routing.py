"""Whether a small model can tell which questions to leave to a large one.

The idea is that of Crayon (Bang et al., ACL 2024, arXiv 2406.07007), whose thresholds and numbers are not published: the
questions that the small model is least sure of are escalated. What is measured here, and how, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgrove.evaluation.metrics import Measured, draws, interval, mean

SHARES = (0.1, 0.2, 0.3, 0.5)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """What is left to the large model, and the accuracy that this gives.

    Attributes:
        share: the fraction of all records that is escalated: those of the smallest confidence.
        below: the confidence below which a record is escalated; None: all that may be.
        accuracy: of both models together.
        random: the accuracy if as many were escalated at random; the mean over all ways to draw them.
        more: ``accuracy`` minus ``random``, with the interval of the difference.
    """

    share: float
    below: float | None
    accuracy: Measured
    random: float
    more: Measured


@dataclass(frozen=True)
class Routing:
    """How well the small model's confidence routes.

    Attributes:
        records: how many were answered.
        private: how many of them were not escalated, whatever the confidence.
        small, large: the accuracy of each model alone; the large one's on the records that may be escalated.
        auroc: the probability that a record which the small model gets wrong has a smaller confidence than one which it gets
            right, ties counting one half: 0.5 says that the confidence is worth nothing. None: it gets all right, or all wrong.
        points: by share.
    """

    records: int
    private: int
    small: Measured
    large: Measured
    auroc: Measured | None
    points: tuple[Point, ...]


def routing(
    confidence: Sequence[float],
    small: Sequence[bool],
    large: Sequence[bool],
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> Routing:
    """How accuracy grows with the share of records that is escalated.

    Intervals are 95 % intervals by bootstrap over records. A threshold is chosen without looking at an answer, so the accuracy
    is not flattered; but another text has other confidences, so another share of it is below the threshold.

    Args:
        confidence: (records,): the small model's.
        small: (records,): whether its answer is correct.
        large: whether the large model's is, for the first ``len(large)`` records; the rest may not be escalated.
        shares: fractions of all records; one that is larger than the part that may be escalated is that part.
        seed: of the bootstrap.
    """
    confident, ours = np.asarray(confidence, float), np.asarray(small, float)
    number, public = len(confident), len(large)
    order = np.argsort(confident[:public], kind="stable")
    gains = (np.asarray(large, float) - ours[:public])[order]
    drawn = draws(number, np.random.default_rng(seed))
    once = np.ones((1, number))

    def measure(share: float) -> Point:
        def both(counts: Floats) -> tuple[Floats, Floats]:
            return _together(counts, ours, order, gains, share)

        routed, random = both(once)
        many, by_chance = both(drawn)
        rest = order[round(share * number) :]
        return Point(
            share,
            float(confident[rest[0]]) if len(rest) else None,
            Measured(float(routed[0]), *interval(many)),
            float(random[0]),
            Measured(float(routed[0] - random[0]), *interval(many - by_chance)),
        )

    reached = sorted({min(share, public / number) for share in shares})
    return Routing(
        number, number - public, mean(ours.tolist()), mean([float(right) for right in large]), _auroc(confident, ours, drawn),
        tuple(map(measure, reached)),
    )  # fmt: skip


def _together(counts: Floats, small: Floats, order: NDArray[np.int64], gains: Floats, share: float) -> tuple[Floats, Floats]:
    """Accuracy if the least confident are escalated, and if as many are drawn at random.

    Args:
        counts: (draws, records): how often each record is there.
        small: (records,): whether the small model is right.
        order: the records that may be escalated, by rising confidence.
        gains: by the same, whether the large model is right minus whether the small one is.
        share: of all records.

    Returns:
        (draws,) each.
    """
    total, may = counts.sum(1), counts[:, order]
    budget = np.minimum(share * total, may.sum(1))
    before = may.cumsum(1) - may
    escalated = np.clip(budget[:, None] - before, 0, may)
    alone = counts @ small / total
    at_random = np.divide(budget, may.sum(1), out=np.zeros_like(budget), where=may.sum(1) > 0)
    return alone + escalated @ gains / total, alone + at_random * (may @ gains) / total


def _auroc(confident: Floats, right: Floats, drawn: Floats) -> Measured | None:
    """See :attr:`Routing.auroc`; draws in which all are right, or all wrong, say nothing and are left out."""
    if not 0 < right.sum() < len(right):
        return None
    order = np.argsort(confident, kind="stable")
    starts = np.flatnonzero(np.diff(confident[order], prepend=-np.inf))  # of records of equal confidence

    def of(counts: Floats) -> Floats:
        wrong, good = (np.add.reduceat(counts[:, order] * part[order], starts, 1) for part in (1 - right, right))
        before = wrong.cumsum(1) - wrong / 2
        return np.asarray((before * good).sum(1) / (wrong.sum(1) * good.sum(1)))

    some = drawn[(drawn @ right > 0) & (drawn @ (1 - right) > 0)]
    return Measured(float(of(np.ones((1, len(right))))[0]), *interval(of(some)))
