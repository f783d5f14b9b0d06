"""OWL (Yin et al., ICML 2024): blocks with many outliers among their weighted inputs keep more of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedgrove.stages.prune.allocation import Options
from fedgrove.stages.prune.input_statistics import InputStatistics, Needs

NEEDS: Needs = "squares"

HIGHEST = 0.99  # no block loses more


def measure(weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics], options: Options) -> float:
    """The outlier ratio of a block (paper, Eq. 1): how many of its |W_ij|·‖x_j‖₂ exceed M times their mean.

    The paper's: the score, the mean over all linears of the block together, M = ``options.owl_m``. Norms of summed squares
    are those of the pooled text, so the ratio from the sums of several clients is that of their text in one place; the mean of
    ratios that clients measured on their own is near it, not the same.

    Args:
        weights: (out, in) each.
        inputs: Σ x² of each.

    Returns:
        A fraction; 0 where all scores are zero. (The published code counts in percent, which ``allocate`` does not notice.)
    """

    def score(name: str) -> Tensor:
        norms = inputs[name].squares.to(weights[name].device).sqrt().float()
        return weights[name].float().abs() * norms

    total = sum(weight.numel() for weight in weights.values())
    mean = sum(float(score(name).sum(dtype=torch.float64)) for name in weights) / total
    return sum(int((score(name) > options.owl_m * mean).sum()) for name in weights) / total


def allocate(measured: Sequence[float], sizes: Sequence[int], sparsity: float, options: Options) -> list[float]:
    """Spreads a sparsity over blocks: those with the most outliers lose 2λ less than those with the fewest.

    The paper's (as in its code): kept_b = 2λ·(D_b − min D)/(max D − min D), shifted so that the mean is 1 − sparsity; λ is
    ``options.owl_lambda``. Ours: blocks of unequal size count by their weights; where a block would lose less than nothing or
    more than 99 %, it is held there and the others make up for it; ratios that are all alike give all blocks the same.

    Args:
        measured: D by block.
        sizes: weights by block.

    Returns:
        The sparsity of each block; Σ sizes·sparsities / Σ sizes is ``sparsity``.
    """
    low, high = min(measured), max(measured)
    span = (high - low) or 1.0
    wanted = [-2 * options.owl_lambda * (value - low) / span for value in measured]
    total = sum(sizes)

    def at(shift: float) -> list[float]:
        return [min(max(value + shift, 0.0), max(HIGHEST, sparsity)) for value in wanted]

    low, high = 0.0, 1.0 + 2 * options.owl_lambda
    for _ in range(100):  # halving: the mean grows with the shift
        middle = (low + high) / 2
        if sum(size * value for size, value in zip(sizes, at(middle), strict=True)) < sparsity * total:
            low = middle
        else:
            high = middle
    return at(high)
