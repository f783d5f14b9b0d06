"""The features that a gate looks at, from those of :mod:`fedgrove.models.features`.

Of windows they are centered, uncorrelated and in whole numbers. Their directions are those along which the owners' means are
farthest apart, compared with how far apart the windows of one owner are: a linear discriminant whose classes are the owners.
Where owners have kinds of text in unequal parts, these are the directions between kinds. Where the owners' means are no farther
apart than chance makes them, and by choice, they are the principal directions of all windows, each scaled to variance 1. For
both, clients sum products as whole numbers.

Of an owner as a whole they are the direction of the sum of its windows' features, each scaled to norm 1, in a random
projection; and relative to the mean of all owners' directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedgrove.models.features import projection
from fedgrove.rounds.aggregator.fixed_point import FixedPoint
from fedgrove.rounds.aggregator.moments import BITS as MOMENT_BITS
from fedgrove.rounds.aggregator.moments import Moments

BITS = 8
CODE = FixedPoint(BITS)
CLIP = 16  # standard deviations
PROJECTED = 256  # hidden states are projected to so many numbers before their products are summed
TOGETHER = 64  # windows are computed in multiples of these: none is in the rest of a vectorized loop, which may round otherwise
OWNERS = FixedPoint(16)  # of an owner's direction, as it travels
RIDGE = 0.1  # of the mean variance, added to all: with few windows some directions look narrower than they are
LEAST = 1e-6  # variance of a direction that is used, as a fraction of the largest


def directions(moments: Moments, size: int) -> tuple[Tensor, Tensor]:
    """The mean of all windows (numbers,), and the principal directions (numbers, at most ``size``) scaled to variance 1."""
    values, vectors = torch.linalg.eigh(moments.covariance())
    kept = min(size, int((values > LEAST * values[-1]).sum()))
    return moments.mean(), _signed(vectors.flip(1)[:, :kept]) / values.flip(0)[:kept].sqrt()


def own_products(sums: Moments) -> Tensor:
    """n·m·mᵀ of an owner's n windows with mean m, what all its windows would add to Σ x·xᵀ if they were alike.

    Returns:
        The upper triangle with its diagonal, row by row, int64, in the unit of ``sums.squares``.
    """
    total = sums.sums.sum(0).double()
    rows, columns = torch.triu_indices(len(total), len(total))
    return (total[rows] * total[columns] / max(1, sums.records)).round().long()


def between_owners(moments: Moments, own: Tensor, size: int, owners: int) -> tuple[Tensor, Tensor]:
    """The mean of all windows (numbers,), and the directions between owners, (numbers, at most ``size``); there may be none.

    Along each, the variance of an owner's windows is 1 in the mean over owners. Those with the most between them come first;
    those along which means could be as far apart by chance are left out. If all windows were alike, the largest variance of the
    means of p numbers would be near (√p + √owners)² / n of n windows, and a little more as the variance within is estimated,
    too: divided by (1 − √(p / n))² (edges of Marchenko and Pastur).

    Args:
        own: the sum over owners of :func:`own_products`.
        owners: how many.
    """
    mean, width = moments.mean(), len(moments.squares)
    rows, columns = torch.triu_indices(width, width)
    of_means = torch.zeros(width, width, dtype=torch.float64)
    of_means[rows, columns] = of_means[columns, rows] = own.double() * 2.0 ** (-2 * MOMENT_BITS) / moments.records
    between = of_means - torch.outer(mean, mean)
    within = moments.covariance() - between
    values, vectors = torch.linalg.eigh(within + RIDGE * within.diagonal().mean() * torch.eye(width, dtype=torch.float64))
    white = vectors / values.clamp_min(2.0 ** (-2 * MOMENT_BITS)).sqrt()  # features are rounded to that
    apart, along = torch.linalg.eigh(white.T @ between @ white)
    few = math.sqrt(width / moments.records)
    by_chance = (few + math.sqrt(owners / moments.records)) ** 2 / (1 - few) ** 2 if few < 1 else math.inf
    kept = min(size, owners - 1, int((apart > by_chance).sum()))
    return mean, _signed(white @ along.flip(1)[:, :kept])


def that_tell_apart(moments: Moments, own: Tensor, size: int, owners: int, members: int) -> tuple[Tensor, Tensor]:
    """As :func:`between_owners`, if there are as many directions as between so many members; else as :func:`directions`."""
    mean, along = between_owners(moments, own, size, owners)
    return (mean, along) if along.shape[1] >= max(1, members - 1) else directions(moments, size)


def _signed(vectors: Tensor) -> Tensor:
    """Columns whose largest entry is positive."""
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0].sign()


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
