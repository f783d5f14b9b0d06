"""A mean that a few liars cannot move far: at every position the highest and the lowest values are left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedgrove.rounds.aggregator.weighted_sum import WeightedSum


@dataclass
class TrimmedSum(WeightedSum):
    """WeightedSum whose mean leaves out, at every position, the ``trim`` highest and lowest values of those who kept it.

    The coordinate-wise trimmed mean (Yin et al., ICML 2018), here over the clients whose mask keeps the position. Where no more
    than twice ``trim`` kept it, the value nearest to zero, which is no larger than an honest one; where no more than ``trim``
    did, who may all lie, the value ``before`` the round. Votes are counted as ever: a client has one.

    The outermost values are held apart and never added, so that one of 10³⁰ does not wipe out the digits of the others.
    Memory: 2·``trim`` more tensors, whatever the number of clients.

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
        """Adds one client: a mask, and values that are floats; every client counts alike."""
        assert change is not None, "there are no values to trim"
        assert isinstance(weight, Tensor), "a position is trimmed over those who kept it"
        assert scale == 1, "a trimmed mean knows no weights"
        nothing = torch.full(change.shape, torch.nan, dtype=torch.float64, device=change.device)
        if not self.high:
            self.high = [nothing.clone() for _ in range(self.trim)]
            self.low = [nothing.clone() for _ in range(self.trim)]
        left = torch.where(weight, change.double(), nothing)  # what passes on from place to place; NaN: nothing
        for places, better in ((self.high, torch.gt), (self.low, torch.lt)):
            for place, held in enumerate(places):
                takes = ~left.isnan() & (held.isnan() | better(left, held))
                places[place], left = torch.where(takes, left, held), torch.where(takes, held, left)
        super().add(left.nan_to_num(nan=0.0), weight, scale)

    def mean(self) -> Tensor:
        """See above; float64, 0 where nobody kept the position."""
        assert self.value is not None, "no client sent a change"
        assert isinstance(self.weight, Tensor)
        held = torch.stack([*self.high, *self.low])
        nearest = held.abs().nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
        few = torch.where(self.weight > self.trim, held.gather(0, nearest)[0], self.before.double())
        rest = self.weight - 2 * self.trim
        mean = torch.where(rest > 0, self.value / rest.clamp(min=1), few)
        return mean.masked_fill(self.weight == 0, 0.0)
