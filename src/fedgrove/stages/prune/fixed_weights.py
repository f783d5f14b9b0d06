"""Pruned weights as fixed-point numbers, for sums under secure aggregation."""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedgrove.rounds.aggregator.fixed_point import FixedPoint

VALUE_BITS = 48  # of the ring in which masked weights are summed
GROWTH = 8  # a pruner may make a weight at most so many times larger than the largest one of its matrix


class FixedWeights(BaseModel):
    """Weights as fixed-point numbers, for a sum under secure aggregation.

    Attributes:
        units: by linear, the exponent of two by which its weights are multiplied.
        clients: how many at most are summed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    units: dict[str, int]
    clients: int

    @property
    def limit(self) -> int:
        """What no client's number reaches, so that the sum fits the ring."""
        return (1 << (VALUE_BITS - 2)) // self.clients

    def encode(self, name: str, change: Tensor) -> Tensor:
        """A pruned weight as int64.

        Raises:
            OutOfRange: a value is not finite, or so large that the sum could overflow.
        """
        return FixedPoint(self.units[name]).encode(change, self.limit)

    def decode(self, name: str, total: Tensor) -> Tensor:
        """The sum of what clients encoded, float64."""
        return FixedPoint(self.units[name]).decode(total)


def unit_of(before: Tensor, clients: int) -> int:
    """The exponent of two by which a linear's weights are multiplied to make fixed-point numbers of them.

    With eight clients the unit is 2⁻³⁹ of the largest weight: the values of a bfloat16 model travel as they are down to
    2⁻³² of the largest, those of a float32 model lose what lies below 2⁻³⁹.

    Args:
        before: the linear's weight.
        clients: how many at most are summed.
    """
    largest = max(float(before.abs().max()), torch.finfo(torch.float32).tiny)
    return VALUE_BITS - 2 - math.ceil(math.log2(GROWTH * clients * largest))
