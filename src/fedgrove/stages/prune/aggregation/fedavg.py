"""FedAvg (McMahan et al., AISTATS 2017) of pruned weights: the baseline of FedSpaLLM."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedgrove.models.masks import Target, keep
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import Disclosure
from fedgrove.stages.prune.aggregation import Options

SENDS = frozenset({Disclosure.WEIGHTS})
SOLVED_AT: Literal["client", "server"] = "client"
READS = frozenset({"expand", "max_weight_growth"})
SECURE = False
SOURCE: Literal["dense", "sequential"] = "sequential"
DAMPING: Literal["mean", "each"] = "mean"


def weigh(before: Tensor, after: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor, float]:
    """The pruned weight including its zeros, weighted by the client's number of tokens."""
    return after, float(tokens)


def finish(before: Tensor, sums: WeightedSum, target: Target, options: Options) -> tuple[Tensor, Tensor]:
    """The mean over all clients, zeros included; then the smallest |mean| are pruned until the target is reached.

    The second step is ours, so that the baseline is compared at equal sparsity; without it (``options.expand`` = False)
    only the weights that every client pruned are zero.

    Args:
        before: (out, in), ignored.
        sums: Σ tokens·W and Σ tokens.
        target: the sparsity of the result.

    Returns:
        The weight in ``before``'s dtype and its mask (True = kept).
    """
    mean = sums.mean()
    mask = mean != 0
    if options.expand:
        mask &= keep([mean.abs()], target)
    return mean.masked_fill_(~mask, 0.0).to(before.dtype), mask
