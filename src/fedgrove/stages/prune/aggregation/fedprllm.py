"""FedPrLLM (arXiv 2505.13547): clients send masks alone; the server prunes by votes and keeps the dense values."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedgrove.models.masks import Target, keep
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import Disclosure
from fedgrove.stages.prune.aggregation import Options

SENDS = frozenset({Disclosure.MASKS})
SOLVED_AT: Literal["client", "server"] = "client"
READS = frozenset[str]()
SECURE = True
SOURCE: Literal["dense", "sequential"] = "sequential"
DAMPING: Literal["mean", "each"] = "mean"


def weigh(before: Tensor, after: Tensor, mask: Tensor, tokens: int) -> tuple[None, Tensor]:
    """Nothing but the mask: one bit for each weight goes up."""
    return None, mask


def finish(before: Tensor, sums: WeightedSum, target: Target, options: Options) -> tuple[Tensor, Tensor]:
    """Keeps the weights with the most votes at the values that they had before.

    The paper's: the comparison over the whole matrix and the unscaled survivors, its best variant. Ours: ties fall by
    |before| ascending, then by position, where the published code draws lots without a seed.

    Args:
        before: (out, in): the values that survivors keep.
        sums: Σ M of the clients that were given this tensor.
        target: the sparsity of the result.

    Returns:
        The weight in ``before``'s dtype and its mask (True = kept).
    """
    keys = [sums.weight_like(before), before.abs().double()]
    mask = keep(keys, target)
    return before.masked_fill(~mask, 0.0), mask
