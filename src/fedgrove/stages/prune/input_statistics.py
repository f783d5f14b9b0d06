"""What a pruner may know of the inputs of a linear: sums over tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

Needs = Literal["nothing", "squares", "gram", "moments"]
STRIP = 256  # rows of a Gram matrix that are computed at once
PART = 512  # tokens of which a float32 copy is made at once: larger ones come from new pages each time (heap.py)


class InputStatistics:
    """WeightedSum over the calibration tokens x of one linear (or of several that read the same input).

    Every number is a sum over windows, so the statistics of several clients add up to those of the pooled data.
    Products are taken in float32 for each window and added in float64: the order of float32 rounding inside a window
    is fixed, and the sum over windows loses nothing that matters.

    Of a Gram matrix only what lies right of the diagonal is computed and held, in strips of rows: half of the products, half
    of the memory. Who can do with the strips reads those; ``gram`` is the whole matrix, made when it is read.

    Attributes:
        needs: what is being summed.
        tokens: number of tokens seen.
    """

    def __init__(self, needs: Needs, tokens: int = 0, total: Tensor | None = None):
        self.needs = needs
        self.tokens = tokens
        self._total = total
        self._strips: list[Tensor] = []  # instead of a total
        self._powers: Tensor | None = None
        self._made: dict[Callable[[InputStatistics], Tensor], Tensor] = {}

    def add(self, x: Tensor) -> None:
        """Adds windows: x is (tokens, in) or (…, tokens, in), any float dtype; there may be no tokens."""
        assert self._powers is None, "its channels are equilibrated already"
        windows = x[None] if x.dim() == 2 else x.flatten(0, -3)
        x = windows.flatten(0, 1)
        self.tokens += x.shape[0]
        self._made.clear()
        if self.needs == "nothing":
            return
        width = x.shape[1]
        if self.needs == "gram":
            self._cut(width, x.device)
            parts = [part.float() for part in torch.split(x, PART)]
            for start, strip in self.strips():
                product = parts[0][:, start : start + len(strip)].T @ parts[0][:, start:]
                for part in parts[1:]:
                    product.addmm_(part[:, start : start + len(strip)].T, part[:, start:])
                strip += product
            return
        if self._total is None:
            rows = (3,) if self.needs == "moments" else ()
            self._total = torch.zeros(*rows, width, dtype=torch.float64, device=x.device)
        if self.needs == "squares":
            self._total += x.float().square().sum(0)
            return
        for window in windows.float():
            self._total += torch.stack(moments(window))

    def _cut(self, width: int, device: torch.device) -> None:
        """From a whole Gram matrix, or from none, to strips."""
        if self._strips:
            return
        for start in range(0, width, STRIP):
            shape = min(STRIP, width - start), width - start
            blank = torch.zeros(shape, dtype=torch.float64, device=device)
            self._strips.append(blank if self._total is None else blank.copy_(self._total[start : start + STRIP, start:]))
        self._total = None

    def strips(self) -> Iterator[tuple[int, Tensor]]:
        """A Gram matrix from its first row to its last: (start, (rows, in − start) float64): rows from ``start`` on, and of
        them what lies in the columns from ``start`` on."""
        start = 0
        for strip in self._strips:
            yield start, strip
            start += len(strip)
        if not self._strips:
            for start in range(0, len(self.gram), STRIP):
                yield start, self.gram[start : start + STRIP, start:]

    @property
    def total(self) -> Tensor | None:
        """Σ x², (in,), for "squares"; Σ x xᵀ, (in, in), for "gram"; for "moments" (3, in): Σ x², Σ x, and Σ over windows of
        Σ (x − the window's mean)². Float64; None before the first window."""
        if self._strips:
            width = self._strips[0].shape[1]
            self._total = self._strips[0].new_empty(width, width)
            for start, strip in self.strips():
                end = start + len(strip)
                self._total[start:end, start:] = strip
                self._total[end:, start:end] = strip[:, len(strip) :].T
            self._strips.clear()
        return self._total

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ, (in, in) float64."""
        assert self.needs == "gram", "this pruner did not say that it needs the Gram matrix"
        assert self.total is not None, "no window was added"
        return self.total

    def equilibrate(self) -> Tensor:
        """Divides each channel of a Gram matrix by a power of two, so that all become about equally large; in place, once.

        Returns:
            (in,) float64: the powers, from 2⁻³⁰ to 1, so that a weight can be multiplied and divided by them exactly.
        """
        if self._powers is None:
            exponents = torch.log2(self.squares.sqrt()).round()
            self._powers = torch.exp2((exponents - exponents.max()).nan_to_num(nan=0.0).clamp(min=-30.0))
            self._cut(len(self._powers), self._powers.device)
            for start, strip in self.strips():
                strip /= self._powers[start : start + len(strip), None]
                strip /= self._powers[start:]
            self._made.clear()
        return self._powers

    def once(self, make: Callable[[InputStatistics], Tensor]) -> Tensor:
        """What is made of these sums, kept for the other linears that read this input: q, k and v need one factor."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    @property
    def squares(self) -> Tensor:
        """Σ x², (in,) float64."""
        if self._strips:
            return torch.cat([strip.diagonal() for strip in self._strips])
        assert self._total is not None, "no window was added"
        if self.needs == "moments":
            return self._total[0]
        return self._total.diagonal() if self.needs == "gram" else self._total

    @property
    def silent(self) -> bool:
        """Whether nothing but zeros was seen, or nothing at all: of such inputs no pruner can tell what matters."""
        return (self._total is None and not self._strips) or not bool(self.squares.any())

    @property
    def means(self) -> Tensor:
        """E[x], (in,) float64."""
        assert self.needs == "moments", "this pruner did not say that it needs means"
        assert self._total is not None, "no window was added"
        return self._total[1] / self.tokens

    @property
    def variances(self) -> Tensor:
        """The mean over windows of the variance in a window, (in,) float64."""
        assert self.needs == "moments", "this pruner did not say that it needs variances"
        assert self._total is not None, "no window was added"
        return self._total[2] / self.tokens


def moments(window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ x², Σ x and Σ (x − mean)² of one window (tokens, in), each (in,) float64."""
    wide = window.double()
    return window.square().sum(0, dtype=torch.float64), wide.sum(0), (wide - wide.mean(0)).square().sum(0)
