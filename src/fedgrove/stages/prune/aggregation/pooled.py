"""WeightedSum instead of solutions: clients send what a pruner needs to know of their text, and the server prunes.

What Wanda and SparseGPT need of the data is a sum over tokens, so the sums of several clients are the sum of their pooled
data, and the result is the one that a single owner of all the data would get. (Additivity is plain algebra; the fixed
point and its scaling below are ours.)

Bit for bit needs more than algebra, for floating-point sums depend on their order. Here every window of text is rounded
once to whole multiples of 2⁻¹², and whole numbers are summed in int64: which client holds which window, in what order,
changes nothing. Rounding needs to know how large numbers are, without a look at anybody's text: the server runs the dense
model once over random tokens, takes the size of every input channel from that, and sends it rounded to a power of two
(``scale``). Clients multiply by it, which is exact, and the server divides by it again. Channels may then be 2¹⁵ times
larger on real text than on random tokens before a sum of 2²⁰ tokens would overflow; a client refuses before that.

Other than a first round of diagonals to scale by, this takes one ask a block and no more: a client that drops out leaves a
sum that is exactly that of the others, and a run needs no two sums whose difference is one client's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds.aggregator.fixed_point import FixedPoint
from fedgrove.rounds.request import CHANGE, Disclosure, TensorSpecs
from fedgrove.rounds.wire import WireError, check
from fedgrove.stages.prune.input_statistics import InputStatistics
from fedgrove.stages.prune.input_statistics import moments as moments_of

SENDS = frozenset({Disclosure.SQUARES, Disclosure.PRODUCTS, Disclosure.MOMENTS})  # by pruner: see exchanges/statistics.py
SOLVED_AT: Literal["client", "server"] = "server"
READS = frozenset({"mixed", "protect_first_block", "epsilon"})
SECURE = True
SOURCE: Literal["dense", "sequential"] = "dense"
DAMPING: Literal["mean", "each"] = "each"

BITS = 12  # fractional bits of one token's x², where x is of the size that random tokens give
CODE = FixedPoint(BITS)
QUIET = 2.0**-10  # a channel that random tokens hardly reach is scaled as if it were this part of the others' size
STRIP = 512  # rows of the products that are made at once
LARGEST = 2**62  # of a sum over all clients
HEADROOM = 14  # bits that secure aggregation leaves for channels that are larger on real text: in all, 128 times


@dataclass
class Statistic:
    """The client's half: Σ x² and, if wanted, Σ xᵢxⱼ for i < j over the tokens of one input, in fixed point.

    Attributes:
        name: the input, named after the first linear that reads it.
        scale: (in,) float32 powers of two.
        products: whether the pruner needs Σ xᵢxⱼ too; moments: whether it needs Σ x and the variance in each window.
        limit: the largest sum that may be sent.
        squares: (in,) int64.
        upper: (in, in) int64, right of the diagonal; what lies left of it has no meaning.
        mechanism: clips each window's squares and adds this client's share of the noise, for differential privacy.
        sums, spreads: (in,) int64: Σ x, and Σ over windows of Σ (x − the window's mean)².
    """

    name: str
    scale: Tensor
    products: bool
    limit: int = LARGEST
    mechanism: GaussianMechanism | None = None
    moments: bool = False
    tokens: int = 0
    squares: Tensor = field(init=False)
    upper: Tensor | None = None
    sums: Tensor = field(init=False)
    spreads: Tensor = field(init=False)

    def __post_init__(self) -> None:
        width = self.scale.numel()
        self.squares, self.sums, self.spreads = torch.zeros(3, width, dtype=torch.int64, device=self.scale.device)
        if self.products:
            self.upper = torch.zeros(width, width, dtype=torch.int64, device=self.scale.device)

    def add(self, x: Tensor) -> None:
        """Adds windows: x is (…, tokens, in) or (tokens, in); each is rounded by itself, so they may come in any company.

        Raises:
            FedgroveError: NaN, infinity, or so large that the sum would overflow.
        """
        for window in x[None] if x.dim() == 2 else x.flatten(0, -3):
            scaled = window.float() * self.scale
            squares = scaled.square().sum(0, dtype=torch.float64)
            if self.mechanism is not None and torch.isfinite(squares).all():  # what is not is refused below, not clipped to 0
                squares = self.mechanism.clip(squares)
            if not (squares < LARGEST >> BITS).all() or (self.squares > self.limit - _whole(squares)).any():
                raise FedgroveError(
                    f"the inputs of {self.name} are not finite or far larger than the model's on random tokens; "
                    'try model.dtype = "float32", or aggregation = "fedspallm"'
                )
            self.squares += _whole(squares)  # by Cauchy and Schwarz no product is larger than these
            if self.upper is not None:
                for top in range(0, scaled.shape[1], STRIP):
                    strip = scaled[:, top : top + STRIP].T @ scaled[:, top:]
                    self.upper[top : top + STRIP, top:] += _whole(strip)
            if self.moments:  # |Σ x| is at most (tokens + Σ x²) / 2, so both are as small as the squares
                _, sums, spreads = moments_of(scaled)
                self.sums += _whole(sums)
                self.spreads += _whole(spreads)
            self.tokens += window.shape[0]

    def answer(self) -> dict[str, Tensor]:
        """What is put into the sum: ``squares`` (in,), ``products`` (in·(in − 1)/2,), rows one after the other, ``sums``, …

        With noise every call draws anew.
        """
        squares = self.squares if self.mechanism is None else self.mechanism.add_share(self.squares)
        answer = {f"{CHANGE}{self.name}/squares": squares}
        if self.upper is not None:
            answer[f"{CHANGE}{self.name}/products"] = self.upper[_above(self.scale)]
        if self.moments:
            answer |= {f"{CHANGE}{self.name}/sums": self.sums, f"{CHANGE}{self.name}/spreads": self.spreads}
        return answer


def scale_of(probe: InputStatistics) -> Tensor:
    """The powers of two that bring every channel to about size one, from a pass over random tokens.

    Args:
        probe: Σ x² of an input.

    Returns:
        (in,) float32.
    """
    rms = (probe.squares / probe.tokens).sqrt()
    typical = rms.square().mean().sqrt()
    if typical == 0 or not torch.isfinite(typical):
        return torch.ones(rms.shape)
    return torch.exp2(-torch.floor(torch.log2(rms.clamp(min=QUIET * float(typical))))).float()


def ring_bits(tokens: int) -> int:
    """How many bits secure aggregation gives a sum over so many tokens."""
    return min(64, BITS + tokens.bit_length() + HEADROOM + 2)


def expected(widths: Mapping[str, int], products: Collection[str], moments: bool = False) -> TensorSpecs:
    """Names, shapes and dtypes of a response.

    Args:
        widths: channels of each input.
        products: the inputs whose products are summed too; moments: whether Σ x and the variances are.
    """
    wanted: TensorSpecs = {}
    for name, width in widths.items():
        wanted[f"{CHANGE}{name}/squares"] = (torch.Size([width]), torch.int64)
        if name in products:
            wanted[f"{CHANGE}{name}/products"] = (torch.Size([width * (width - 1) // 2]), torch.int64)
        if moments:
            wanted |= {f"{CHANGE}{name}/{part}": (torch.Size([width]), torch.int64) for part in ("sums", "spreads")}
    return wanted


def check_sums(
    tensors: Mapping[str, Tensor],
    widths: Mapping[str, int],
    products: Collection[str],
    windows: int,
    limit: int,
    noisy: bool = False,
    moments: int = 0,
) -> None:
    """Refuses numbers that cannot be sums of squares and products: of one client, or of all.

    Args:
        widths, products: see :func:`expected`.
        windows: how many were summed.
        limit: the largest number that is allowed.
        noisy: noise was added, so a square may be negative.
        moments: tokens of a window, where Σ x and the variances are summed too.

    Raises:
        WireError: names, shapes or dtypes differ, a square is negative or too large, or a product, sum or variance larger than
            the squares allow (Cauchy–Schwarz, with room for the rounding of each window).
    """
    check(tensors, expected(widths, products, moments > 0))
    for name in widths:
        squares = tensors[f"{CHANGE}{name}/squares"]
        if (squares < (-limit if noisy else 0)).any() or (squares > limit).any():
            raise WireError(f"{CHANGE}{name}/squares is out of range")
        if moments:
            sums, spreads = tensors[f"{CHANGE}{name}/sums"], tensors[f"{CHANGE}{name}/spreads"]
            most = (moments * windows * 2.0**BITS * (squares.double() + windows)).sqrt() * 1.001 + windows
            if (sums.double().abs() > most).any() or (spreads < 0).any() or (spreads > squares + 2 * windows).any():
                raise WireError(f"{CHANGE}{name}/sums or spreads are larger than the squares allow")
        if name in products:
            roots = (squares.double() + windows).sqrt() * 1.001
            at, values = 0, tensors[f"{CHANGE}{name}/products"]
            for i in range(len(roots) - 1):
                row = values[at : at + len(roots) - 1 - i]
                if (row.double().abs() > roots[i] * roots[i + 1 :] + windows).any():
                    raise WireError(f"{CHANGE}{name}/products is larger than the squares allow")
                at += len(row)


def finish(
    squares: Tensor, products: Tensor | None, scale: Tensor, tokens: int, moments: tuple[Tensor, Tensor] | None = None
) -> InputStatistics:
    """The server's half: the sums as a pruner reads them.

    Args:
        squares: (in,) int64, summed over clients; noise may have made some negative: those count as 0.
        products: (in·(in − 1)/2,) int64, or None.
        scale: (in,), what the clients multiplied by.
        tokens: of all clients.
        moments: ``sums`` and ``spreads``, summed over clients, where they were asked for.
    """
    unit = 2.0**-BITS
    squares = squares.clamp(min=0)
    size = 1 / scale.double()
    if moments is not None:
        rows = [squares.double() * size.square(), moments[0].double() * size, moments[1].double() * size.square()]
        return InputStatistics("moments", tokens, torch.stack(rows) * unit)
    if products is None:
        return InputStatistics("squares", tokens, squares.double() * unit * size.square())
    gram = torch.zeros(len(scale), len(scale), dtype=torch.float64)
    gram[_above(scale)] = products.double()
    gram += gram.T.clone()
    gram.diagonal().copy_(squares.double())
    gram *= (size * unit)[:, None]
    gram *= size
    return InputStatistics("gram", tokens, gram)


def _whole(value: Tensor) -> Tensor:
    return CODE.encode(value)  # the squares are checked, and bound everything else


def _above(scale: Tensor) -> Tensor:
    return torch.ones(len(scale), len(scale), dtype=torch.bool, device=scale.device).triu_(1)
