"""Magnitude pruning: removes the smallest weights of a matrix. Needs no data; the baseline that other pruners must beat."""

from __future__ import annotations

from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind
from fedgrove.models.masks import Target, keep

NEEDS: StatisticsKind = "nothing"


def prune(weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Zeroes the weights of smallest absolute value, compared over the whole matrix (or inside each N:M group).

    Args:
        weight: (out, in) float32; overwritten.
        inputs: ignored.
        target: how many weights are pruned.

    Returns:
        The pruned weight and its mask (True = kept).
    """
    score = weight.abs()
    mask = keep([score], target)
    return weight.masked_fill_(~mask, 0.0), mask
