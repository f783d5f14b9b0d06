"""Scores of channels and heads. A new score is a new file here; its file name is its name in the job.

A score is computed from a sum over windows of text. The clients' sums add up to the sum over their pooled text, so the pruned
model is the one that the pooled text would give.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from fedgrove import plugins

PACKAGE = "stages.structured.scores"


class Score(Protocol):
    """The contract of a score's file.

    ``products`` are the first-order changes of one window's loss, in nats, if something is cut: a group, or with
    ``PER_WEIGHT`` a single weight of a group; see :func:`fedgrove.stages.structured.gradients.group_products`.

    Attributes:
        SIGNED: whether :meth:`weigh` may return negative numbers.
        PER_WEIGHT: whether single weights are weighed, and added up over all weights of a group in all its linears. This takes
            the gradients of the weights, so more memory and a third more time.
    """

    SIGNED: bool
    PER_WEIGHT: bool

    def weigh(self, products: Tensor) -> Tensor:
        """What each product adds to the sum, each by itself: the result has the shape of ``products``."""
        ...

    def finish(self, total: Tensor) -> Tensor:
        """The scores from the sum over all clients' windows, (groups,); the groups with the lowest scores are cut."""
        ...


METHOD = Score


def score_of(name: str) -> Score:
    """Loads a score by name."""
    return cast(Score, plugins.load(PACKAGE, name))
