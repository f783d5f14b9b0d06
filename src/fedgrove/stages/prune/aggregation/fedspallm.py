"""FedSpaLLM (Bai et al., NAACL 2025): averages each weight over the clients that kept it, and prunes by votes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fedgrove.models.masks import Target, keep
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import Disclosure
from fedgrove.stages.prune.aggregation import Options

SENDS = frozenset({Disclosure.MASKS, Disclosure.WEIGHTS})
SOLVED_AT: Literal["client", "server"] = "client"
READS = frozenset({"shrink", "expand", "trim", "max_weight_growth"})
SECURE = True
SOURCE: Literal["dense", "sequential"] = "sequential"
DAMPING: Literal["mean", "each"] = "mean"


def weigh(before: Tensor, after: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The pruned weight, weighted by its mask.

    The values themselves are sent, not differences to ``before``: all clients of a round share ``before``, so the mean is the
    same, and there is no rounding of a difference.
    """
    return after, mask


def finish(before: Tensor, sums: WeightedSum, target: Target, options: Options) -> tuple[Tensor, Tensor]:
    """ℓ0-norm aggregation (paper, Eq. 5), then adaptive mask expansion (paper, Sec. 4.2).

    Position j becomes Σᵢ aᵢ Mᵢ[j] Wᵢ[j] / Σᵢ aᵢ Mᵢ[j]: the mean over the clients that kept it, or 0 if none did. These zeros
    are fewer than the target, so the weights with the fewest votes are pruned as well, until exactly
    ``target.num_pruned(numel)`` are zero. With a pattern n:m, the n weights with the most votes of every m are kept.

    From the paper: both steps, with aᵢ = 1. Ours: among equal votes, weights are pruned by ascending |mean|, then by position
    (the paper does not say); aᵢ is the inverse of the probability that the client was assigned this block, so that clients
    with many blocks do not dominate; ``options.shrink`` = γ multiplies the kept weights by (votes to keep / all votes)^γ
    (the paper: γ = 0); ``options.expand`` = False skips the second step.

    If the clients' common zeros already exceed the target (clients may have individual sparsities), the result keeps them: it
    is sparser than the target.

    Args:
        before: (out, in), ignored.
        sums: Σ a·M·W and Σ a·M over the clients to which this tensor was assigned.
        target: the sparsity of the result.

    Returns:
        The weight in ``before``'s dtype and its mask (True = kept).
    """
    votes = sums.weight
    assert isinstance(votes, Tensor), "clients vote with masks"
    mean = sums.mean()
    mask = votes > 0
    agreed = not target.pattern and int((~mask).count_nonzero()) >= target.num_pruned(mask.numel())
    if options.expand and not agreed:  # if agreed, the common zeros reach the target and there is nothing to select
        mask &= keep([votes, mean.abs()], target)
    if options.shrink:
        mean *= (votes.double() / sums.clients) ** options.shrink
    return mean.masked_fill_(~mask, 0.0).to(before.dtype), mask
