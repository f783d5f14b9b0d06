"""Which channels and heads matter: the two ends of a sum over windows of text. A new score is a new file here.

What is added is a sum over windows, so the clients' sums are the sum of their pooled text, and so is the model.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from fedgrove import plugins

PACKAGE = "stages.structured.scores"


class Score(Protocol):
    """What a score's file holds. ``products`` are first-order changes of a window's loss, in nats, were a group cut; see
    :func:`fedgrove.stages.structured.gradients.group_products`.

    Attributes:
        SIGNED: whether what is added may be negative.
    """

    SIGNED: bool

    def weigh(self, products: Tensor) -> Tensor:
        """What each window adds: (windows, groups) -> (windows, groups)."""
        ...

    def finish(self, total: Tensor) -> Tensor:
        """The score of each group from the sum over everybody's windows: the lowest go."""
        ...


METHOD = Score


def score_of(name: str) -> Score:
    """The score of that name."""
    return cast(Score, plugins.load(PACKAGE, name))
