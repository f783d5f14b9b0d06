"""Heads: how sums of moments become a linear classifier. A new head is a new file here; its file name is its name in the job.

All heads are functions of the same sums, so the head of any number of owners is that of their pooled records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from fedgrove import plugins
from fedgrove.rounds.aggregator.moments import Moments

PACKAGE = "stages.head.heads"


@dataclass(frozen=True)
class Linear:
    """Scores of classes: the highest one wins.

    Attributes:
        weight: (classes, features) float64.
        bias: (classes,) float64.
    """

    weight: Tensor
    bias: Tensor


class Head(Protocol):
    """The contract of a head's file.

    Attributes:
        PRODUCTS: whether it needs the products of each pair of features, besides their squares.
    """

    PRODUCTS: bool

    def records_needed(self, classes: int, features: int) -> int:
        """The fewest records from which it can be made."""
        ...

    def solve(self, moments: Moments, ridge: float) -> Linear:
        """The head.

        Args:
            moments: of the labels that have records: at least two of them.
            ridge: added to the variance of every feature, as a fraction of it.
        """
        ...

    def reweigh(self, linear: Linear, before: Tensor, after: Tensor) -> Linear:
        """The head for other frequencies of the labels, by Bayes' rule: p'(y | x) ∝ p(y | x) · p'(y) / p(y).

        Args:
            before, after: (classes,) frequencies of the records that the head is made from, and those of an owner; positive.
        """
        ...


METHOD = Head


def head_of(name: str) -> Head:
    """Loads a head by name."""
    return cast(Head, plugins.load(PACKAGE, name))
