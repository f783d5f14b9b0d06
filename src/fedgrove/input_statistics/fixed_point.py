"""Sums over the inputs of a linear as whole numbers, so that the clients' sums add up exactly to those of their pooled data.

For results that are equal bit for bit, algebra is not enough, because floating-point sums depend on their order. So the sums of
each window are rounded once to multiples of 2⁻¹², and these integers are summed in int64: it does not matter which client
has which window, or in what order they are added. Rounding requires the typical size of the numbers, which must not be measured
on a client's text: the server runs the dense model once over random tokens, measures each input channel, and sends the scale
as a power of two (``scale``). Clients multiply by it, which is exact, and the server divides by it again. Channels may be 2¹⁵
times larger on real text than on random tokens before a sum of 2²⁰ tokens overflows; a client refuses before that.

A scheme that scaled by a first round of diagonals would need two requests per block; this one needs a single request. If a
client drops out, the sum is exactly that of the others, and the server never gets two sums whose difference is one client's
data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.input_statistics import statistics
from fedgrove.input_statistics.statistics import InputStatistics, at_once
from fedgrove.input_statistics.statistics import moments as moments_of
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds.aggregator.fixed_point import FixedPoint
from fedgrove.rounds.request import CHANGE, TensorSpecs
from fedgrove.rounds.wire import WireError, check

BITS = 12  # fractional bits of one token's scaled x²
CODE = FixedPoint(BITS)
MIN_CHANNEL = 2.0**-10  # times the typical size: smaller channels on random tokens are scaled as if they had this size
STRIP = 512  # rows of the products that are computed at once
LARGEST = 2**62  # the largest sum over all clients
MAX_NORM = float(1 << (61 - BITS))  # a window's clipped squares and ``LARGEST`` together stay below 2^63
HEADROOM = 14  # bits that secure aggregation leaves for channels that are larger on real text: by up to 128 times


@dataclass
class Statistic:
    """The client's half: fixed-point sums over the tokens x of one input.

    Attributes:
        name: the input, named after the first linear that reads it.
        scale: (in,) float32 powers of two by which x is multiplied.
        products: whether the pruner also needs Σ xᵢxⱼ.
        limit: the largest sum that may be sent.
        mechanism: for differential privacy: clips each window's squares and adds this client's share of the noise. Its
            clipping norm is at most ``MAX_NORM``, and there are no products and moments.
        moments: whether the pruner also needs Σ x and the variance within each window.
        tokens: number of tokens added.
        squares: Σ x², (in,) int64.
        upper: Σ xᵢxⱼ for i < j, in strips of :data:`STRIP` rows i, each (rows, in − the first i) int64; the entries on and
            below the diagonal are meaningless.
        sums, spreads: (in,) int64: Σ x, and the sum over windows of Σ (x − the window's mean)².
    """

    name: str
    scale: Tensor
    products: bool
    limit: int = LARGEST
    mechanism: GaussianMechanism | None = None
    moments: bool = False
    tokens: int = 0
    squares: Tensor = field(init=False)
    upper: list[Tensor] = field(default_factory=list)
    sums: Tensor = field(init=False)
    spreads: Tensor = field(init=False)

    def __post_init__(self) -> None:
        width = self.scale.numel()
        self.squares, self.sums, self.spreads = torch.zeros(3, width, dtype=torch.int64, device=self.scale.device)
        if self.products:
            self.upper = [self.squares.new_zeros(min(STRIP, width - top), width - top) for top in range(0, width, STRIP)]

    def add(self, x: Tensor) -> None:
        """Adds windows. Each is rounded separately, so the result does not depend on how windows are batched.

        With noise a window that holds NaN or infinity counts as zero, and a sum stays at ``limit``.

        Args:
            x: (tokens, in) or (…, tokens, in).

        Raises:
            FedgroveError: without noise: x holds NaN or infinity, or is so large that the sum would overflow.
        """
        for window in x[None] if x.dim() == 2 else x.flatten(0, -3):
            scaled = window.float() * self.scale
            squares = scaled.square().sum(0, dtype=torch.float64)
            if self.mechanism is not None:  # nothing that depends on one window may be an error
                squares = self.mechanism.clip(squares)
                self.squares = (self.squares + _encoded(squares)).clamp(max=self.limit)
                self.tokens += window.shape[0]
                continue
            if not (squares < LARGEST >> BITS).all() or (self.squares > self.limit - _encoded(squares)).any():
                raise FedgroveError(
                    f"the inputs of {self.name} are not finite or far larger than on random tokens",
                    'try model.dtype = "float32", or aggregation = "fedspallm"',
                )
            self.squares += _encoded(squares)  # by Cauchy–Schwarz the products are no larger
            for index, strip in enumerate(self.upper):
                top = index * STRIP
                strip += _encoded(scaled[:, top : top + STRIP].T @ scaled[:, top:])
            if self.moments:  # |Σ x| ≤ (tokens + Σ x²) / 2, so the check of the squares covers both
                _, sums, spreads = moments_of(scaled)
                self.sums += _encoded(sums)
                self.spreads += _encoded(spreads)
            self.tokens += window.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to send: ``squares``, (in,); ``products``, the upper triangle row by row, (in·(in − 1)/2,);
        ``sums`` and ``spreads``, (in,) each. Which of them depends on ``products`` and ``moments``.

        With noise, every call draws new noise.
        """
        squares = self.squares if self.mechanism is None else self.mechanism.add_share(self.squares)
        tensors = {f"{CHANGE}{self.name}/squares": squares}
        if self.products:
            tensors[f"{CHANGE}{self.name}/products"] = torch.cat([strip[_above_diagonal(strip)] for strip in self.upper])
        if self.moments:
            tensors |= {f"{CHANGE}{self.name}/sums": self.sums, f"{CHANGE}{self.name}/spreads": self.spreads}
        return tensors


def scale_of(probe: InputStatistics) -> Tensor:
    """The powers of two that scale every channel to a root mean square of about one.

    Args:
        probe: Σ x² of an input on random tokens.

    Returns:
        (in,) float32.
    """
    rms = (probe.squares / probe.tokens).sqrt()
    typical = rms.square().mean().sqrt()
    if typical == 0 or not torch.isfinite(typical):
        return torch.ones(rms.shape)
    return torch.exp2(-torch.floor(torch.log2(rms.clamp(min=MIN_CHANNEL * float(typical))))).float()


def ring_bits(tokens: int) -> int:
    """The width in bits of the ring in which secure aggregation adds sums over this many tokens."""
    return min(64, BITS + tokens.bit_length() + HEADROOM + 2)


def expected(widths: Mapping[str, int], products: Collection[str], moments: bool = False) -> TensorSpecs:
    """Names, shapes and dtypes of a response.

    Args:
        widths: number of channels of each input.
        products: the inputs whose products are summed too.
        moments: whether Σ x and the variances are summed too.
    """
    specs: TensorSpecs = {}
    for name, width in widths.items():
        specs[f"{CHANGE}{name}/squares"] = (torch.Size([width]), torch.int64)
        if name in products:
            specs[f"{CHANGE}{name}/products"] = (torch.Size([width * (width - 1) // 2]), torch.int64)
        if moments:
            specs |= {f"{CHANGE}{name}/{part}": (torch.Size([width]), torch.int64) for part in ("sums", "spreads")}
    return specs


def check_sums(
    tensors: Mapping[str, Tensor],
    widths: Mapping[str, int],
    products: Collection[str],
    windows: int,
    limit: int,
    noisy: bool = False,
    moments: int = 0,
) -> None:
    """Refuses tensors of one client, or totals of all clients, that cannot be sums of squares and products.

    Args:
        widths, products: see :func:`expected`.
        windows: number of windows that were summed.
        limit: the largest number that is allowed.
        noisy: whether noise was added, so that a square may be negative.
        moments: tokens of a window if Σ x and the variances are summed too, else 0.

    Raises:
        WireError: names, shapes or dtypes differ; a square is negative or too large; or a product, sum or variance exceeds the
            bound that the squares imply (Cauchy–Schwarz, with a margin for the rounding of each window).
    """
    check(tensors, expected(widths, products, moments > 0))
    for name in widths:
        squares = tensors[f"{CHANGE}{name}/squares"]
        if (squares < (-limit if noisy else 0)).any() or (squares > limit).any():
            raise WireError(f"{CHANGE}{name}/squares is out of range")
        if moments:
            sums, spreads = tensors[f"{CHANGE}{name}/sums"], tensors[f"{CHANGE}{name}/spreads"]
            bound = (moments * windows * 2.0**BITS * (squares.double() + windows)).sqrt() * 1.001 + windows
            if (sums.double().abs() > bound).any() or (spreads < 0).any() or (spreads > squares + 2 * windows).any():
                raise WireError(f"{CHANGE}{name}/sums or spreads are larger than the squares allow")
        if name in products:
            roots = (squares.double() + windows).sqrt() * 1.001
            offset, values = 0, tensors[f"{CHANGE}{name}/products"]
            for i in range(len(roots) - 1):
                row = values[offset : offset + len(roots) - 1 - i]
                if (row.double().abs() > roots[i] * roots[i + 1 :] + windows).any():
                    raise WireError(f"{CHANGE}{name}/products is larger than the squares allow")
                offset += len(row)


def finish(
    squares: Tensor, products: Tensor | None, scale: Tensor, tokens: float, moments: tuple[Tensor, Tensor] | None = None
) -> InputStatistics:
    """The server's half: turns the sums into the statistics for a pruner.

    Args:
        squares: (in,) int64, or float64 where sums are weighted; summed over clients; values that noise made negative are
            set to 0.
        products: (in·(in − 1)/2,) of the same dtype, or None.
        scale: (in,), by which the clients multiplied.
        tokens: in the sums.
        moments: ``sums`` and ``spreads``, summed over clients, if they were requested.
    """
    unit = 2.0**-BITS
    squares = squares.clamp(min=0)
    size = 1 / scale.double()
    if moments is not None:
        rows = [squares.double() * size.square(), moments[0].double() * size, moments[1].double() * size.square()]
        return InputStatistics("moments", tokens, torch.stack(rows) * unit)
    if products is None:
        return InputStatistics("squares", tokens, squares.double() * unit * size.square())
    return InputStatistics("gram", tokens, strips=_strips(squares, products, size * unit, size))


def _strips(squares: Tensor, products: Tensor, row_factors: Tensor, factors: Tensor) -> Iterator[Tensor]:
    """The strips of a Gram matrix (:meth:`~fedgrove.input_statistics.statistics.InputStatistics.strips`) from its sums.

    Strip by strip, because a square matrix of a wide input would be most of the server's memory.
    """
    width, offset = len(squares), 0
    rows = at_once(statistics.STRIP, squares.device)
    for start in range(0, width, rows):
        strip = row_factors.new_zeros(min(rows, width - start), width - start)
        above = _above_diagonal(strip)
        number = int(above.count_nonzero())
        strip[above] = products[offset : offset + number].double()
        offset += number
        corner = strip[:, : len(strip)]
        corner += corner.T.clone()
        strip.diagonal().copy_(squares[start : start + len(strip)])
        strip *= row_factors[start : start + len(strip), None]
        strip *= factors[start:]
        yield strip


def _encoded(value: Tensor) -> Tensor:
    return CODE.encode(value)  # without a limit: the squares are checked, and they bound all other sums


def _above_diagonal(strip: Tensor) -> Tensor:
    """Which entries of a strip are above the matrix's diagonal; the strip begins on it."""
    return torch.ones(strip.shape, dtype=torch.bool, device=strip.device).triu_(1)
