"""FedPrLLM (arXiv 2505.13547): clients send only masks; the server prunes by votes and keeps the dense values."""

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
    """Only the mask: one bit per weight is sent."""
    return None, mask


def finish(before: Tensor, sums: WeightedSum, target: Target, options: Options) -> tuple[Tensor, Tensor]:
    """Keeps the weights with the most votes, at their previous values.

    From the paper: the comparison over the entire matrix, with kept weights not rescaled (its best variant). Ours: among equal
    votes, weights are pruned by ascending |before|, then by position; the published code chooses at random without a seed.

    Args:
        before: (out, in), the values of the kept weights.
        sums: Σ M over the clients to which this tensor was assigned.
        target: the sparsity of the result.

    Returns:
        The weight in ``before``'s dtype and its mask (True = kept).
    """
    keys = [sums.weight_like(before), before.abs().double()]
    mask = keep(keys, target)
    return before.masked_fill(~mask, 0.0), mask
