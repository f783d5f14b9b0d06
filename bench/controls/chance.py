"""The control of bench/structured.py: groups are drawn at random, whatever the text says."""

from __future__ import annotations

import torch
from torch import Tensor

SIGNED = False
PER_WEIGHT = False


def weigh(products: Tensor) -> Tensor:
    """As ``fisher``, so that each block draws differently."""
    return products.square()


def finish(total: Tensor) -> Tensor:
    """A random number for each group."""
    generator = torch.Generator().manual_seed(int(total.sum()) % 2**31)
    return torch.rand(total.shape, generator=generator, dtype=torch.float64)
