"""The features that a gate looks at, from those of :mod:`fedgrove.models.features`: centered, uncorrelated, in whole numbers.

Directions are the principal ones of all windows' covariance, which clients sum as whole numbers; each is scaled to variance 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.rounds.aggregator.fixed_point import FixedPoint
from fedgrove.rounds.aggregator.moments import Moments

BITS = 8
CODE = FixedPoint(BITS)
CLIP = 16  # standard deviations
PROJECTED = 256  # hidden states are projected to so many numbers before their products are summed
TOGETHER = 64  # windows are computed in multiples of these: none is in the rest of a vectorized loop, which may round otherwise
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
