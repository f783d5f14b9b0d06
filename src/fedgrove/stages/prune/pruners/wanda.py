"""Wanda (Sun et al., ICLR 2024): weight times the norm of its input, compared inside each output row."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.models.masks import Target, keep_highest
from fedgrove.stages.prune.input_statistics import InputStatistics, Needs

NEEDS: Needs = "squares"


def prune(weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Zeroes the weights of lowest score |W_ij|·‖x_j‖₂ in each row; the others keep their value.

    The score and the comparison by row are the paper's. Ours: the number that goes differs by at most one between
    rows so that the matrix meets its target exactly, where the published code rounds down in every row.

    Args:
        weight: (out, in) float32; overwritten.
        inputs: squared norms of the input channels, ``squares`` (in,).
        target: how many weights go.

    Returns:
        The pruned weight and its mask (True = kept).

    Raises:
        ValueError: the statistics hold NaN or infinity.
    """
    norms = inputs.squares.sqrt().to(weight.dtype)
    if not torch.isfinite(norms).all():
        raise ValueError("the statistics of the inputs are not finite")
    score = weight.abs() * norms
    mask = keep_highest([score], target)
    return weight.masked_fill_(~mask, 0.0), mask
