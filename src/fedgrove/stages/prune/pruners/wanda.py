"""Wanda (Sun et al., ICLR 2024): scores a weight by its size times the norm of its input, compared within each output row."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind
from fedgrove.models.masks import Target, keep_highest

NEEDS: StatisticsKind = "squares"


def prune(weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Zeroes the weights with the lowest score |W_ij|·‖x_j‖₂ in each row; the others keep their value.

    From the paper: the score and the comparison within rows. Ours: the number of pruned weights differs by at most one between
    rows, so that the matrix meets its target exactly; the published code rounds down in every row. Of a weight that has zeros
    already, as in a second round, these are pruned first, also where a row has more of them than others: else the matrix
    would get more zeros in every round.

    Args:
        weight: (out, in) float32; overwritten.
        inputs: ``squares`` (in,), the squared norms of the input channels.
        target: how many weights are pruned.

    Returns:
        The pruned weight and its mask (True = kept).

    Raises:
        ValueError: the statistics hold NaN or infinity.
    """
    norms = inputs.squares.sqrt().to(weight.dtype)
    if not torch.isfinite(norms).all():
        raise ValueError("the statistics of the inputs are not finite")
    zeros = weight == 0
    score = (weight.abs() * norms).masked_fill_(zeros, -1.0)  # below weights of silent inputs
    mask = keep_highest([score], target, zeros)
    return weight.masked_fill_(~mask, 0.0), mask
