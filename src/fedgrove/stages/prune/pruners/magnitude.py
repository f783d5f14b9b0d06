"""Magnitude: the smallest weights of a matrix go. Needs no data: the floor that every other pruner must beat."""

from __future__ import annotations

from torch import Tensor

from fedgrove.models.masks import Target, keep
from fedgrove.stages.prune.input_statistics import InputStatistics, Needs

NEEDS: Needs = "nothing"


def prune(weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Zeroes the weights of smallest absolute value, compared over the whole matrix (or inside each N:M group).

    Args:
        weight: (out, in) float32; overwritten.
        inputs: not looked at.
        target: how many weights go.

    Returns:
        The pruned weight and its mask (True = kept).
    """
    score = weight.abs()
    mask = keep([score], target)
    return weight.masked_fill_(~mask, 0.0), mask
