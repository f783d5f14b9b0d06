"""How unlike everybody's text a new text is: its surprise against a histogram of windows that the gate was not fitted to.

The surprise of a window is −log p per feature under the federation's mixture (``surprise`` of a gate). Its p-value is the part
of the federation's held-out windows that are at least as surprising: of new text like theirs, 5 % of the windows have p ≤ 0.05.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 2048
LOWEST = -4.0  # no window has a smaller surprise: the variance of a component is at least a hundredth
FINE = 300  # bins in a factor e of surprise above LOWEST − 1: 0.02 wide where most windows are


def bins(surprise: Tensor) -> Tensor:
    """(windows,) float64 -> the index of each window's bin, int64."""
    return (FINE * torch.log1p((surprise - LOWEST).clamp_min(0))).long().clamp(max=BINS - 1)


def count(surprise: Tensor) -> Tensor:
    """(BINS,) int64: how many windows are in each bin."""
    return torch.bincount(bins(surprise), minlength=BINS)


def p_values(surprise: Tensor, counts: Tensor) -> Tensor:
    """(windows,) float64 in (0, 1]: the part of ``counts`` in a window's bin or above, with the window itself counted."""
    above = counts.flip(0).cumsum(0).flip(0).double()
    return (above[bins(surprise)] + 1) / (above[0] + 1)
