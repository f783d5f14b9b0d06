"""The trimmed mean, robust against a few malicious clients: leaves out the highest and lowest values at every position."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedgrove.rounds.aggregator.weighted_sum import WeightedSum


@dataclass
class TrimmedSum(WeightedSum):
    """A weighted sum whose mean leaves out the ``trim`` highest and lowest values at every position.

    The coordinate-wise trimmed mean (Yin et al., ICML 2018), here over the clients whose mask keeps the position. If at most
    2·``trim`` clients kept it, the result is the value nearest to zero, which is no larger than an honest one; if at most
    ``trim`` did, all of whom may be malicious, it is the value ``before`` the round. Votes are counted as in the base class.

    The extreme values are stored separately and never added, so that a value of 10³⁰ does not cancel the digits of the others.
    Memory: 2·``trim`` additional tensors, regardless of the number of clients.

    >>> sums = TrimmedSum(trim=1, before=torch.tensor([3.0]))
    >>> for value in (1.0, 2.0, 6.0, 1e30):
    ...     sums.add(torch.tensor([value]), torch.tensor([True]))
    >>> sums.mean()
    tensor([4.], dtype=torch.float64)
    """

    trim: int = 1
    before: Tensor = field(default_factory=lambda: torch.zeros(()))
    high: list[Tensor] = field(default_factory=list)
    low: list[Tensor] = field(default_factory=list)

    def add(self, change: Tensor | None, weight: Tensor | float, scale: float = 1.0) -> None:
        """Adds one client: float values and their mask; all clients have equal weight."""
        assert change is not None, "a trimmed mean needs values"
        assert isinstance(weight, Tensor), "a trimmed mean needs masks"
        assert scale == 1, "a trimmed mean has no weights"
        nothing = torch.full(change.shape, torch.nan, dtype=torch.float64, device=change.device)
        if not self.high:
            self.high = [nothing.clone() for _ in range(self.trim)]
            self.low = [nothing.clone() for _ in range(self.trim)]
        rest = torch.where(weight, change.double(), nothing)  # not stored among the extremes so far; NaN: no value
        for extremes, exceeds in ((self.high, torch.gt), (self.low, torch.lt)):
            for i, extreme in enumerate(extremes):
                swap = ~rest.isnan() & (extreme.isnan() | exceeds(rest, extreme))
                extremes[i], rest = torch.where(swap, rest, extreme), torch.where(swap, extreme, rest)
        super().add(rest.nan_to_num(nan=0.0), weight, scale)

    def mean(self) -> Tensor:
        """The trimmed mean, float64; 0 where no client kept the position."""
        assert self.value is not None, "no client sent a change"
        assert isinstance(self.weight, Tensor)
        extremes = torch.stack([*self.high, *self.low])
        nearest = extremes.abs().nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
        few = torch.where(self.weight > self.trim, extremes.gather(0, nearest)[0], self.before.double())
        count = self.weight - 2 * self.trim
        mean = torch.where(count > 0, self.value / count.clamp(min=1), few)
        return mean.masked_fill(self.weight == 0, 0.0)
