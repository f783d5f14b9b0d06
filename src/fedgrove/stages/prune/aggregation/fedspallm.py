"""FedSpaLLM (Bai et al., NAACL 2025): average a weight over those who kept it; let votes decide which weights go."""

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

    The change is told from zero, not from ``before``: every client of a round starts from the same ``before``, so the
    mean is the same, and the kept values travel without a rounding.
    """
    return after, mask


def finish(before: Tensor, sums: WeightedSum, target: Target, options: Options) -> tuple[Tensor, Tensor]:
    """ℓ0-norm aggregation (paper, Eq. 5), then adaptive mask expansion (paper, Sec. 4.2).

    Position j becomes Σᵢ aᵢ Mᵢ[j] Wᵢ[j] / Σᵢ aᵢ Mᵢ[j]: the mean over the clients that kept it, and 0 where nobody did. Such
    zeros are fewer than the target, so the weights with the fewest votes to be kept go too, until exactly
    ``target.num_pruned(numel)`` are gone. With a pattern n:m the n most voted of every m stay.

    The paper's: both steps, with aᵢ = 1. Ours: ties among votes fall by |mean| ascending, then by position (the paper
    does not say); aᵢ is the inverse of the probability that the client was given this block, so that clients with many
    blocks do not dominate; ``options.shrink`` = γ multiplies what stays by (votes to keep / all votes)^γ (0 = the
    paper); ``options.expand`` = False leaves out the second step.

    Where every client pruned more than the target asks (clients may have sparsities of their own), the result is as
    sparse as they agreed on, and not denser.

    Args:
        before: (out, in), not looked at.
        sums: Σ a·M·W and Σ a·M of the clients that were given this tensor.
        target: the sparsity of the result.

    Returns:
        The weight in ``before``'s dtype and its mask (True = kept).
    """
    votes = sums.weight
    assert isinstance(votes, Tensor), "clients vote with masks"
    mean = sums.mean()
    mask = votes > 0
    agreed = not target.pattern and int((~mask).count_nonzero()) >= target.num_pruned(mask.numel())
    if options.expand and not agreed:  # zeros that nobody kept are enough where clients agree: then there is nothing to select
        mask &= keep([votes, mean.abs()], target)
    if options.shrink:
        mean *= (votes.double() / sums.clients) ** options.shrink
    return mean.masked_fill_(~mask, 0.0).to(before.dtype), mask
