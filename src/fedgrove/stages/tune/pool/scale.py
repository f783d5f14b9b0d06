"""The features that a gate looks at, from those of :mod:`fedgrove.models.features`.

Of windows they are centered, uncorrelated and in whole numbers: the principal directions of all windows' covariance, which
clients sum as whole numbers, each scaled to variance 1. Of an owner as a whole they are the direction of the sum of its
windows' features, each scaled to norm 1, in a random projection; and relative to the mean of all owners' directions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedgrove.models.features import projection
from fedgrove.rounds.aggregator.fixed_point import FixedPoint
from fedgrove.rounds.aggregator.moments import Moments

BITS = 8
CODE = FixedPoint(BITS)
CLIP = 16  # standard deviations
PROJECTED = 256  # hidden states are projected to so many numbers before their products are summed
TOGETHER = 64  # windows are computed in multiples of these: none is in the rest of a vectorized loop, which may round otherwise
OWNERS = FixedPoint(16)  # of an owner's direction, as it travels
LEAST = 1e-6  # variance of a direction that is used, as a fraction of the largest


def directions(moments: Moments, size: int) -> tuple[Tensor, Tensor]:
    """The mean of all windows (numbers,), and the principal directions (numbers, at most ``size``) scaled to variance 1."""
    values, vectors = torch.linalg.eigh(moments.covariance())
    kept = min(size, int((values > LEAST * values[-1]).sum()))
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    sign = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0].sign()
    return moments.mean(), vectors * sign / values.sqrt()


def scaled(numbers: Tensor, mean: Tensor, along: Tensor) -> Tensor:
    """(windows, numbers) -> (windows, size) float64, clipped, and rounded to multiples of 2⁻⁸."""
    return CODE.decode(CODE.encode(((numbers - mean) @ along).clamp(-CLIP, CLIP)))


def at_random(numbers: int, size: int, seed: str) -> Tensor:
    """The projection of an owner's features, the same at every client: (numbers, at most ``size``) float64."""
    found = projection(numbers, size, f"{seed}/owners")
    return torch.eye(numbers, dtype=torch.float64) if found is None else found


def unit(numbers: Tensor, along: Tensor) -> Tensor:
    """Each window's direction: (windows, numbers) -> (windows, size) float64, of norm 1."""
    return normalize(numbers @ along, dim=1)


def directions_of(totals: Tensor) -> Tensor:
    """An owner's direction from the sum of its windows', as it travels: (1, size) float64.

    Args:
        totals: (1, size); or (2, size), the sums of both halves, whose directions then follow: (3, size).
    """
    every = totals if len(totals) == 1 else torch.cat([totals.sum(0, keepdim=True), totals])
    return OWNERS.decode(OWNERS.encode(normalize(every, dim=1)))
