"""Common directions: in every step all clients go along the same one. The default of parametrization "seeds", and ours.

If every client draws its own directions, as published, the clients' slopes do not cancel where their gradients do. With common
directions, the sum of the clients' loss differences is the loss difference of the pooled text. All of a round's slopes are
found where the round starts, so a round has the bits of one owner of all the text: with steps of its own, each client would
leave the others by the noise of its few windows. Each round takes new directions, so the model is not confined to the span of
a fixed number, as in FedKSeed. Precedents: DeComFL (arXiv 2405.15861), FeedSign (arXiv 2501.17610).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedgrove.stages.tune.aggregation import Drawing, Form

TAKES: frozenset[Form] = frozenset({"coefficients"})
EQUAL_RANKS = False
SHARED_A = False
SERVER_OPTIMIZERS = False
DEFAULTS: Mapping[str, Any] = {"seeds": 0}
BOUNDED = False
LOCAL_STEPS = False
SAMPLINGS = ("even",)


def draw(drawing: Drawing) -> list[int]:
    """One direction after the other; after ``seeds`` of them, if bounded, the first again."""
    start = drawing.round * drawing.steps
    directions = range(start, start + drawing.steps)
    return [direction % drawing.seeds for direction in directions] if drawing.seeds else list(directions)


def summed(drawing: Drawing) -> list[int]:
    """A number for each step."""
    return draw(drawing)


def chances(coefficients: Tensor, draws: Tensor, sampling: str) -> None:
    """No direction is preferred."""
