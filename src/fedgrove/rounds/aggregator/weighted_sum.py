"""The weighted sum over clients: Σ weight·change and Σ weight, tensor by tensor. All clients' tensors are summed by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class WeightedSum:
    """The weighted sum of one tensor over clients, in float64; in int64 if the changes are integers.

    Add clients in a fixed order (rounds use the order of their names): then the result is the same bit for bit, regardless of
    which client responds first. Memory does not grow with the number of clients.

    >>> sums = WeightedSum()
    >>> sums.add(torch.tensor([2.0, 0.0, 6.0]), torch.tensor([True, False, True]))
    >>> sums.add(torch.tensor([4.0, 8.0, 0.0]), torch.tensor([True, True, False]))
    >>> sums.mean()                                     # at each position, the mean over the clients that kept it
    tensor([3., 8., 6.], dtype=torch.float64)
    >>> sums.weight                                     # the number of clients that kept it
    tensor([2, 1, 1], dtype=torch.int16)

    Attributes:
        value: Σ scale·weight·change; None if no client sent a change. A sum of integers is exact, so it depends neither on the
            order of the clients nor on which client has which data.
        weight: Σ scale·weight: one number, or a tensor if clients send masks: int16 as long as every scale is 1, else float64.
        clients: Σ scale: what ``weight`` would be if all clients had kept all entries.
    """

    value: Tensor | None = None
    weight: Tensor | float = 0.0
    clients: float = 0.0

    def add(self, change: Tensor | None, weight: Tensor | float, scale: float = 1.0) -> None:
        """Adds one client.

        Args:
            change: any shape and dtype, zero where the mask ``weight`` is False; or None. Integers require weight and scale 1.
            weight: a bool mask of that shape, or one number.
            scale: multiplies both; for example the inverse of the probability that this client got the request.
        """
        if isinstance(weight, Tensor):
            if not isinstance(self.weight, Tensor):
                self.weight = torch.zeros(weight.shape, dtype=torch.int16, device=weight.device)
            if scale != 1 or self.clients >= torch.iinfo(torch.int16).max:
                self.weight = self.weight.double()
            self.weight.add_(weight, alpha=scale if self.weight.is_floating_point() else 1)
            factor = scale  # the change is already zero outside the mask
        else:
            self.weight += scale * weight
            factor = scale * weight
        self.clients += scale
        if change is not None:
            dtype = torch.float64 if change.is_floating_point() else torch.int64
            assert dtype == torch.float64 or factor == 1, "integers are summed without weights"
            if self.value is None:
                self.value = torch.zeros(change.shape, dtype=dtype, device=change.device)
            self.value.add_(change, alpha=factor if dtype == torch.float64 else 1)

    def mean(self) -> Tensor:
        """Σ weight·change / Σ weight, float64; 0 where Σ weight is 0. Aggregations decide whether they want that 0."""
        assert self.value is not None, "no client sent a change"
        if not isinstance(self.weight, Tensor):
            return self.value / self.weight
        return (self.value / self.weight).masked_fill_(self.weight <= 0, 0.0)

    def weight_like(self, tensor: Tensor) -> Tensor:
        """Σ weight as a tensor of that shape, float64."""
        if isinstance(self.weight, Tensor):
            return self.weight.double()
        return torch.full(tensor.shape, self.weight, dtype=torch.float64, device=tensor.device)
