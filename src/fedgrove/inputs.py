"""What a pruner may know of the inputs of a linear: sums over tokens, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Needs = Literal["nothing", "squares", "gram"]


@dataclass
class Inputs:
    """Sums over the calibration tokens x of one linear (or of several that read the same input).

    Every number is a sum over windows, so the statistics of several clients add up to those of the pooled data.
    Products are taken in float32 for each window and added in float64: the order of float32 rounding inside a window
    is fixed, and the sum over windows loses nothing that matters.

    Attributes:
        needs: what is being summed.
        tokens: number of tokens seen.
        total: (in,) for "squares": Σ x²; (in, in) for "gram": Σ x xᵀ; None before the first window; float64.
    """

    needs: Needs
    tokens: int = 0
    total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Adds one window: x is (..., in), any float dtype."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.tokens += x.shape[0]
        if self.needs == "nothing":
            return
        new = x.T @ x if self.needs == "gram" else x.square().sum(0, dtype=torch.float64)
        if self.total is None:
            self.total = new.double()
        else:
            self.total += new

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ, (in, in) float64."""
        assert self.needs == "gram", "this pruner did not say that it needs the Gram matrix"
        assert self.total is not None, "no window was added"
        return self.total

    @property
    def squares(self) -> Tensor:
        """Σ x², (in,) float64."""
        assert self.total is not None, "no window was added"
        return self.total.diagonal() if self.needs == "gram" else self.total
