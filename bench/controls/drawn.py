"""The control of bench/experts.py: the experts that stay are drawn at random, whatever the text says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedgrove.stages.structured.expert_scores import Sum

SUMS: tuple[Sum, ...] = ("tokens",)


def finish(sums: Mapping[str, Tensor]) -> Tensor:
    """A random number for each expert; other text, or another block, draws others."""
    places = torch.arange(1, len(sums["tokens"]) + 1)
    generator = torch.Generator().manual_seed(int((sums["tokens"] * places).sum()) % 2**31)
    return torch.rand(len(places), generator=generator, dtype=torch.float64)
