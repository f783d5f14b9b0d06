"""The one sum: Σ weight·change and Σ weight, tensor by tensor. Everything that clients send goes through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class WeightedSum:
    """What is known of one tensor once clients have been added, in float64; changes that are integers, in int64.

    Add clients in a fixed order (the rounds go by name): then a run is the same bit for bit, whoever answered first.
    Memory does not grow with the number of clients.

    >>> sums = WeightedSum()
    >>> sums.add(torch.tensor([2.0, 0.0, 6.0]), torch.tensor([True, False, True]))
    >>> sums.add(torch.tensor([4.0, 8.0, 0.0]), torch.tensor([True, True, False]))
    >>> sums.mean()                                     # each position over those who kept it
    tensor([3., 8., 6.], dtype=torch.float64)
    >>> sums.weight                                     # and the denominator is the votes
    tensor([2, 1, 1], dtype=torch.int16)

    Attributes:
        value: Σ scale·weight·change; None when no client sent a change. A sum of integers is exact, so it does not even
            depend on the order, nor on which client held what.
        weight: Σ scale·weight: one number, or where clients send masks a tensor: int16 as long as it counts heads (every scale
            is 1), else float64.
        clients: Σ scale: what ``weight`` would be if everybody had kept everything.
    """

    value: Tensor | None = None
    weight: Tensor | float = 0.0
    clients: float = 0.0

    def add(self, change: Tensor | None, weight: Tensor | float, scale: float = 1.0) -> None:
        """Adds one client.

        Args:
            change: any shape and dtype, zero where ``weight`` is; or None. Integers are added as they are: weight and scale 1.
            weight: a bool mask of that shape, or one number.
            scale: multiplies both, for instance by the inverse probability that this client was asked.
        """
        if isinstance(weight, Tensor):
            if not isinstance(self.weight, Tensor):
                self.weight = torch.zeros(weight.shape, dtype=torch.int16, device=weight.device)
            if scale != 1 or self.clients >= torch.iinfo(torch.int16).max:
                self.weight = self.weight.double()
            self.weight.add_(weight, alpha=scale if self.weight.is_floating_point() else 1)
            factor = scale  # the change is zero outside the mask already
        else:
            self.weight += scale * weight
            factor = scale * weight
        self.clients += scale
        if change is not None:
            dtype = torch.float64 if change.is_floating_point() else torch.int64
            assert dtype == torch.float64 or factor == 1, "a sum of integers knows no weights"
            if self.value is None:
                self.value = torch.zeros(change.shape, dtype=dtype, device=change.device)
            self.value.add_(change, alpha=factor if dtype == torch.float64 else 1)

    def mean(self) -> Tensor:
        """Σ weight·change / Σ weight, float64; 0 where nobody has weight. An aggregation decides whether 0 is what it wants."""
        assert self.value is not None, "no client sent a change"
        if not isinstance(self.weight, Tensor):
            return self.value / self.weight
        return (self.value / self.weight).masked_fill_(self.weight <= 0, 0.0)

    def weight_like(self, tensor: Tensor) -> Tensor:
        """Σ weight as a tensor of that shape, float64."""
        if isinstance(self.weight, Tensor):
            return self.weight.double()
        return torch.full(tensor.shape, self.weight, dtype=torch.float64, device=tensor.device)
