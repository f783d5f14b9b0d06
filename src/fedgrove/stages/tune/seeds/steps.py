"""Steps along random directions: what both sides compute from differences of losses, in whole numbers.

g = (L₊ − L₋)/(2ε) is the slope along z (SPSA, Spall 1992; MeZO, arXiv 2305.17333), and a step adds −η·g·z. Ours: losses are
whole multiples of 2⁻²⁴, so that Σ over the windows of several clients has the bits of the sum over one owner of them all.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgrove.stages.tune.seeds.offsets import LARGEST, UNIT

LOSS_BITS = 24  # after the binary point of a loss
MOST_LOSS = 64.0  # nats per token: a larger loss counts as this
LIMIT = 2  # mean |slopes|: a few windows of some texts have most of all slopes, and so much noise that the loss rises
MOST_SUM = 2**31 - 1  # of the numbers that all clients send for one direction


@dataclass(frozen=True)
class Steps:
    """A round's steps at one client.

    Attributes:
        directions: of each step.
        batch: windows of each step.
        learning_rate: η.
        perturbation: ε.
        limit: the largest |Σ of loss differences| that is sent for one step, in units of 2⁻²⁴.
        max_slope: the largest |slope| of one window; larger ones count as this. 0: no limit.
        local: whether the model moves along each direction before the next one is tried; else it stays where it is.
    """

    directions: tuple[int, ...]
    batch: int
    learning_rate: float
    perturbation: float
    limit: int
    max_slope: float = 0.0
    local: bool = True

    def coefficient(self, total: int) -> int:
        """The client's own step after a sum of loss differences."""
        return coefficient(total, self.batch, self.perturbation, self.learning_rate) if self.local else 0

    def clipped(self, differences: Tensor) -> Tensor:
        """The windows' loss differences in units of 2⁻²⁴, int64, each within that of ``max_slope``."""
        if not self.max_slope:
            return differences
        most = int(min(self.max_slope * 2 * self.perturbation, MOST_LOSS) * 2.0**LOSS_BITS)
        return differences.clamp(-most, most)

    def limited(self, total: int) -> int:
        """A sum of loss differences, cut to ±``limit``."""
        return max(-self.limit, min(self.limit, total))


@dataclass(frozen=True)
class Taken:
    """What a trainer returns.

    Attributes:
        differences: for every step, Σ over its windows of L₊ − L₋ in units of 2⁻²⁴, within the limit; (steps,) int64.
        loss: the mean of (L₊ + L₋)/2; None if it may not be disclosed, or no step counted.
        skipped: steps whose loss was not finite.
    """

    differences: Tensor
    loss: float | None
    skipped: int


def limit_for(clients: int) -> int:
    """What one of so many clients may send for a direction, so that the sum fits int32."""
    return MOST_SUM // clients


def whole(losses: Tensor) -> Tensor:
    """Losses as multiples of 2⁻²⁴, (any shape) int64. They must be finite."""
    return (losses.clamp(max=MOST_LOSS) * 2.0**LOSS_BITS).round().long()


def slope(total: int, windows: int, perturbation: float) -> float:
    """g, from a sum of loss differences over so many windows."""
    return total * 2.0**-LOSS_BITS / (2 * perturbation * windows)


def slope_limit(sizes: Tensor, windows: int, perturbation: float) -> float:
    """The largest |slope| of a window that counts as it is: so many times the mean that a few windows cannot make a step.

    Args:
        sizes: (directions,) sums of |L₊ − L₋| in units of 2⁻²⁴, over all clients.
        windows: of all clients.
    """
    return LIMIT * slope(sum(sizes.tolist()), windows * len(sizes), perturbation)


def coefficient(total: int, windows: int, perturbation: float, learning_rate: float) -> int:
    """−η·g in units of a coefficient."""
    step = -learning_rate * slope(total, windows, perturbation) / UNIT
    return round(max(-LARGEST, min(LARGEST, step)))


def choose_perturbation(perturbations: tuple[float, ...], differences: Tensor) -> float:
    """The largest ε whose slopes differ by less than 1 % from those at the next smaller one, which is half of it.

    Args:
        perturbations: falling, each half of the one before.
        differences: (perturbations, directions) sums of loss differences.

    Returns:
        One of them; if none is within 1 %, the one that comes closest.
    """
    slopes = differences.double() / torch.tensor(perturbations, dtype=torch.float64)[:, None]
    off = [float((big - small).norm() / small.norm().clamp(min=1e-300)) for big, small in itertools.pairwise(slopes)]
    close = next((i for i, one in enumerate(off) if one < 0.01), min(range(len(off)), key=lambda i: off[i]))
    return perturbations[close]


def curvature(total: Tensor, windows: int, perturbation: float) -> float:
    """An upper estimate of the trace of the Hessian: its mean over directions and windows, plus one standard error.

    The mean of (L₊ + L₋ − 2 L₀)/ε² along signs is the trace (Hutchinson). A few windows have most of it, so a sample often has
    too little, and a rate that follows from that undoes more than one that is somewhat too low.

    Args:
        total: (directions,) sums of L₊ + L₋ − 2 L₀ in units of 2⁻²⁴, over all clients; two directions at least.
        windows: of all clients, other ones for each direction.
    """
    of_each = [float(one) * 2.0**-LOSS_BITS / (windows * perturbation**2) for one in total.tolist()]
    return statistics.fmean(of_each) + statistics.stdev(of_each) / math.sqrt(len(of_each))
