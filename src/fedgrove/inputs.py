"""What a pruner may know of the inputs of a linear: sums over tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Needs = Literal["nothing", "squares", "gram", "moments"]
STRIP = 256  # columns of a Gram matrix that are computed at once


@dataclass
class Inputs:
    """Sums over the calibration tokens x of one linear (or of several that read the same input).

    Every number is a sum over windows, so the statistics of several clients add up to those of the pooled data.
    Products are taken in float32 for each window and added in float64: the order of float32 rounding inside a window
    is fixed, and the sum over windows loses nothing that matters.

    Of a Gram matrix only the strips from the diagonal to the right are computed, half of the products; what lies below is
    their mirror image, put there when it is read.

    Attributes:
        needs: what is being summed.
        tokens: number of tokens seen.
        total: (in,) for "squares": Σ x²; (in, in) for "gram": Σ x xᵀ, read through ``gram``; (3, in) for "moments": Σ x², Σ x,
            and Σ over windows of Σ (x − the window's mean)²; None before the first window; float64.
    """

    needs: Needs
    tokens: int = 0
    total: Tensor | None = None
    _powers: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _mirrored: bool = field(default=True, init=False, repr=False, compare=False)
    _made: dict[Callable[[Tensor], Tensor], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def add(self, x: Tensor) -> None:
        """Adds windows: x is (tokens, in) or (…, tokens, in), any float dtype; there may be no tokens."""
        assert self._powers is None, "its channels are levelled already"
        windows = (x[None] if x.dim() == 2 else x.flatten(0, -3)).float()
        x = windows.flatten(0, 1)
        self.tokens += x.shape[0]
        self._made.clear()
        if self.needs == "nothing":
            return
        width = x.shape[1]
        if self.total is None:
            rows = {"gram": (width,), "moments": (3,)}.get(self.needs, ())
            self.total = torch.zeros(*rows, width, dtype=torch.float64, device=x.device)
        if self.needs == "squares":
            self.total += x.square().sum(0)
            return
        if self.needs == "moments":
            for window in windows:
                self.total += torch.stack(moments(window))
            return
        for start in range(0, width, STRIP):
            strip = slice(start, start + STRIP)
            self.total[strip, start:] += x[:, strip].T @ x[:, start:]
        self._mirrored = False

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ, (in, in) float64."""
        assert self.needs == "gram", "this pruner did not say that it needs the Gram matrix"
        assert self.total is not None, "no window was added"
        if not self._mirrored:
            for start in range(0, len(self.total), STRIP):
                end = start + STRIP
                self.total[end:, start:end] = self.total[start:end, end:].T
            self._mirrored = True
        return self.total

    def level(self) -> Tensor:
        """Divides each channel of a Gram matrix by a power of two, so that all become about equally large; in place, once.

        Returns:
            (in,) float64: the powers, from 2⁻³⁰ to 1, so that a weight can be multiplied and divided by them exactly.
        """
        if self._powers is None:
            exponents = torch.log2(self.gram.diagonal().sqrt()).round()
            self._powers = torch.exp2((exponents - exponents.max()).nan_to_num(nan=0.0).clamp(min=-30.0))
            assert self.total is not None
            self.total /= self._powers[:, None]
            self.total /= self._powers
            self._made.clear()
        return self._powers

    def once(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make`` of the Gram matrix, kept for the other linears that read this input: q, k and v need one factor."""
        if make not in self._made:
            self._made[make] = make(self.gram)
        return self._made[make]

    @property
    def squares(self) -> Tensor:
        """Σ x², (in,) float64."""
        assert self.total is not None, "no window was added"
        if self.needs == "moments":
            return self.total[0]
        return self.total.diagonal() if self.needs == "gram" else self.total

    @property
    def silent(self) -> bool:
        """Whether nothing but zeros was seen, or nothing at all: of such inputs no pruner can tell what matters."""
        return self.total is None or not bool(self.squares.any())

    @property
    def means(self) -> Tensor:
        """E[x], (in,) float64."""
        assert self.needs == "moments", "this pruner did not say that it needs means"
        assert self.total is not None, "no window was added"
        return self.total[1] / self.tokens

    @property
    def variances(self) -> Tensor:
        """The mean over windows of the variance in a window, (in,) float64."""
        assert self.needs == "moments", "this pruner did not say that it needs variances"
        assert self.total is not None, "no window was added"
        return self.total[2] / self.tokens


def moments(window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ x², Σ x and Σ (x − mean)² of one window (tokens, in), each (in,) float64."""
    wide = window.double()
    return window.square().sum(0, dtype=torch.float64), wide.sum(0), (wide - wide.mean(0)).square().sum(0)
