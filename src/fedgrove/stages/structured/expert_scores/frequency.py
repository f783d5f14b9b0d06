"""How many tokens the router sends to an expert: the usual baseline (for example in Lasby et al., arXiv 2510.13999).

Summed over clients, exactly. It asks clients for less than ``reap``. Do not trust it if frequent experts add little.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedgrove.stages.structured.expert_scores import Sum

SUMS: tuple[Sum, ...] = ("tokens",)


def finish(sums: Mapping[str, Tensor]) -> Tensor:
    """The number of tokens."""
    return sums["tokens"]
