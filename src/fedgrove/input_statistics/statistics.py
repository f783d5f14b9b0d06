"""The statistics of a linear's inputs that pruners use: sums over tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

StatisticsKind = Literal["nothing", "squares", "gram", "moments"]
STRIP = 256  # rows of a Gram matrix that are computed at once
TOKENS_AT_ONCE = 512  # copied to float32 at once; larger copies would be allocated on new memory pages each time (see heap.py)
OWN, FLOOR = 0.02, 0.01  # what equilibration adds to Σ x² of a channel: of its own, and of the median channel's
ON_GPU = 8  # times as many of both: a GPU would wait for the next product to be launched


class InputStatistics:
    """Sums over the calibration tokens x of one linear, or of several linears with the same input.

    Every number is a sum over windows, so the statistics of several clients add up to those of the pooled data. Products are
    computed in float32 for each window and added in float64: within a window the order of the float32 additions is fixed, and
    the sum over windows loses no relevant precision.

    Only the upper triangle of a Gram matrix is computed and stored, in strips of rows, which halves computation and memory.
    :meth:`strips` reads it in this form; ``gram`` is the full matrix, assembled when it is read.

    Attributes:
        kind: which statistics are summed.
        tokens: number of tokens added; no whole number where sums are weighted.

    Args:
        total: the sums, see :attr:`total`; strips: instead, those of a Gram matrix, see :meth:`strips`.
    """

    def __init__(
        self, kind: StatisticsKind, tokens: float = 0, total: Tensor | None = None, strips: Iterable[Tensor] = ()
    ) -> None:
        self.kind = kind
        self.tokens = tokens
        self._total = total
        self._strips = list(strips)  # a Gram matrix is stored either here or in self._total
        self._powers: Tensor | None = None
        self._cache: dict[Callable[[InputStatistics], Tensor], Tensor] = {}

    def add(self, x: Tensor) -> None:
        """Adds windows.

        Args:
            x: (tokens, in) or (…, tokens, in), any float dtype; zero tokens are allowed.
        """
        assert self._powers is None, "the channels are already equilibrated"
        windows = x[None] if x.dim() == 2 else x.flatten(0, -3)
        x = windows.flatten(0, 1)
        self.tokens += x.shape[0]
        self._cache.clear()
        if self.kind == "nothing":
            return
        width = x.shape[1]
        if self.kind == "gram":
            self._to_strips(width, x.device)
            parts = [part.float() for part in torch.split(x, at_once(TOKENS_AT_ONCE, x.device))]
            for start, strip in self.strips():
                product = parts[0][:, start : start + len(strip)].T @ parts[0][:, start:]
                for part in parts[1:]:
                    product.addmm_(part[:, start : start + len(strip)].T, part[:, start:])
                strip += product
            return
        if self._total is None:
            rows = (3,) if self.kind == "moments" else ()
            self._total = torch.zeros(*rows, width, dtype=torch.float64, device=x.device)
        if self.kind == "squares":
            self._total += x.float().square().sum(0)
            return
        for window in windows.float():
            self._total += torch.stack(moments(window))

    def _to_strips(self, width: int, device: torch.device) -> None:
        """Stores the Gram matrix as strips; zeros if there is none yet."""
        if self._strips:
            return
        rows = at_once(STRIP, device)
        for start in range(0, width, rows):
            shape = min(rows, width - start), width - start
            strip = torch.zeros(shape, dtype=torch.float64, device=device)
            self._strips.append(strip if self._total is None else strip.copy_(self._total[start : start + rows, start:]))
        self._total = None

    def copy(self) -> InputStatistics:
        """The same sums, to be changed by themselves."""
        total = self.total
        return InputStatistics(self.kind, self.tokens, None if total is None else total.clone())

    def plus(self, other: InputStatistics) -> InputStatistics:
        """The sums over the inputs of both: those of one weight that two linears share."""
        assert self.kind == other.kind, "the sums are of different kinds"
        assert self._powers is other._powers is None, "the channels are already equilibrated"
        totals = [total for total in (self.total, other.total) if total is not None]
        total = totals[0] + totals[1] if len(totals) == 2 else (totals[0].clone() if totals else None)
        return InputStatistics(self.kind, self.tokens + other.tokens, total)

    def strips(self) -> Iterator[tuple[int, Tensor]]:
        """The upper triangle of the Gram matrix, from the first row to the last.

        Yields:
            (start, strip): strip is (rows, in − start) float64, the entries of the rows and the columns from ``start`` on.
        """
        start = 0
        for strip in self._strips:
            yield start, strip
            start += len(strip)
        if not self._strips:
            for start in range(0, len(self.gram), STRIP):
                yield start, self.gram[start : start + STRIP, start:]

    @property
    def total(self) -> Tensor | None:
        """The sums, float64; None before the first window.

        For "squares" Σ x², (in,). For "gram" Σ x xᵀ, (in, in). For "moments" (3, in): Σ x², Σ x, and the sum over windows of
        Σ (x − the window's mean)².
        """
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
        assert self.kind == "gram", 'the Gram matrix is not summed; the pruner\'s NEEDS must be "gram"'
        assert self.total is not None, "no window was added"
        return self.total

    def equilibrate(self) -> Tensor:
        """Scales the channels of a Gram matrix to about the same size by dividing by powers of two; in place, only once.

        Before, every channel's Σ x² grows by :data:`OWN` times itself and :data:`FLOOR` times the median of all. The second
        matters for channels that are nearly silent in the calibration text, and need not be in other text: without it, weights
        of such channels can become a hundred times as large as any other, because that costs nothing. Channels that are silent
        stay so.

        Returns:
            (in,) float64: the powers, from 2⁻³⁰ to 1; multiplying and dividing a weight by them is exact.
        """
        if self._powers is None:
            squares = self.squares
            self._to_strips(len(squares), squares.device)
            more = torch.where(squares > 0, OWN * squares + FLOOR * squares.median(), 0.0)
            for start, strip in self.strips():
                strip.diagonal().add_(more[start : start + len(strip)])
            exponents = torch.log2(self.squares.sqrt()).round()
            self._powers = torch.exp2((exponents - exponents.max()).nan_to_num(nan=0.0).clamp(min=-30.0))
            for start, strip in self.strips():
                strip /= self._powers[start : start + len(strip), None]
                strip /= self._powers[start:]
            self._cache.clear()
        return self._powers

    def cached(self, function: Callable[[InputStatistics], Tensor]) -> Tensor:
        """``function`` of these statistics, computed once for all linears with this input: q, k and v share one factor."""
        if function not in self._cache:
            self._cache[function] = function(self)
        return self._cache[function]

    @property
    def squares(self) -> Tensor:
        """Σ x², (in,) float64."""
        if self._strips:
            return torch.cat([strip.diagonal() for strip in self._strips])
        assert self._total is not None, "no window was added"
        if self.kind == "moments":
            return self._total[0]
        return self._total.diagonal() if self.kind == "gram" else self._total

    @property
    def silent(self) -> bool:
        """Whether all inputs were zero or no window was added. Pruners that need statistics cannot be used then."""
        return (self._total is None and not self._strips) or not bool(self.squares.any())

    @property
    def means(self) -> Tensor:
        """E[x], (in,) float64."""
        assert self.kind == "moments", 'means are not summed; the pruner\'s NEEDS must be "moments"'
        assert self._total is not None, "no window was added"
        return self._total[1] / self.tokens

    @property
    def variances(self) -> Tensor:
        """The mean of the windows' variances, (in,) float64."""
        assert self.kind == "moments", 'variances are not summed; the pruner\'s NEEDS must be "moments"'
        assert self._total is not None, "no window was added"
        return self._total[2] / self.tokens


def at_once(number: int, device: torch.device) -> int:
    """So many rows or tokens on a CPU, more on a GPU."""
    return number if device.type == "cpu" else number * ON_GPU


def moments(window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ x², Σ x and Σ (x − mean)² of one window (tokens, in), each (in,) float64."""
    wide = window.double()
    return window.square().sum(0, dtype=torch.float64), wide.sum(0), (wide - wide.mean(0)).square().sum(0)
