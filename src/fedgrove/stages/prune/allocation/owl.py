"""OWL (Yin et al., ICML 2024): blocks with many outliers among their weighted inputs keep more weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind
from fedgrove.stages.prune.allocation import Options

NEEDS: StatisticsKind = "squares"

MAX_SPARSITY = 0.99  # of any block


def measure(weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics], options: Options) -> float:
    """The outlier ratio of a block (paper, Eq. 1): the fraction of its scores |W_ij|·‖x_j‖₂ above M times their mean.

    From the paper: the score, the mean over all linears of the block together, and M = ``options.owl_m``. The norms from
    several clients' summed squares are those of the pooled text, so the ratio is that of the pooled text too; the mean of
    ratios that clients measured separately is close to it, not equal.

    Args:
        weights: (out, in) each.
        inputs: Σ x² of each.

    Returns:
        A fraction; 0 if all scores are zero. (The published code uses percent, which makes no difference to ``allocate``.)
    """

    def score(name: str) -> Tensor:
        norms = inputs[name].squares.to(weights[name].device).sqrt().float()
        return weights[name].float().abs() * norms

    total = sum(weight.numel() for weight in weights.values())
    mean = sum(float(score(name).sum(dtype=torch.float64)) for name in weights) / total
    return sum(int((score(name) > options.owl_m * mean).sum()) for name in weights) / total


def allocate(measured: Sequence[float], sizes: Sequence[int], sparsity: float, options: Options) -> list[float]:
    """Distributes a sparsity over blocks: blocks with the most outliers get 2λ less than blocks with the fewest.

    From the paper (as in its code): density_b = 2λ·(D_b − min D)/(max D − min D), shifted so that the mean is 1 − sparsity; λ
    is ``options.owl_lambda``. Ours: blocks of unequal size count by their number of weights; a block's sparsity is clamped to
    0 to 99 %, and the others compensate; if all ratios are equal, all blocks get the same sparsity.

    Args:
        measured: D by block.
        sizes: number of weights by block.

    Returns:
        The sparsity of each block; Σ sizes·sparsities / Σ sizes is ``sparsity``.
    """
    low, high = min(measured), max(measured)
    span = (high - low) or 1.0
    offsets = [-2 * options.owl_lambda * (value - low) / span for value in measured]
    total = sum(sizes)

    def shifted(shift: float) -> list[float]:
        return [min(max(offset + shift, 0.0), max(MAX_SPARSITY, sparsity)) for offset in offsets]

    low, high = 0.0, 1.0 + 2 * options.owl_lambda
    for _ in range(100):  # bisection: the mean sparsity grows with the shift
        middle = (low + high) / 2
        if sum(size * value for size, value in zip(sizes, shifted(middle), strict=True)) < sparsity * total:
            low = middle
        else:
            high = middle
    return shifted(high)
