"""REAP (Lasby et al., arXiv 2510.13999): the mean, over an expert's tokens, of how much it adds to each.

From the paper: S_j = mean of g_j(x)·‖f_j(x)‖₂ over the tokens x that the router sends to expert j, with g_j the weight that the
block gives the expert's output. Ours: numerator and number of tokens are summed over clients, exactly, before they are divided;
an expert that no token reached scores 0.

Do not trust the score of an expert that few tokens reached: it is a mean of few, and such an expert stays if they are large.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedgrove.stages.structured.expert_scores import Sum

SUMS: tuple[Sum, ...] = ("tokens", "outputs")


def finish(sums: Mapping[str, Tensor]) -> Tensor:
    """The mean of an expert's tokens."""
    return sums["outputs"] / sums["tokens"].clamp(min=1)
