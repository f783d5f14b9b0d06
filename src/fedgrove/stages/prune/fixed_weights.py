"""Pruned weights as fixed-point numbers, for sums under secure aggregation."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.job.units import Count, Linear
from fedgrove.rounds.aggregator.fixed_point import FixedPoint
from fedgrove.rounds.request import Part

VALUE_BITS = 48  # the width of the ring in which masked weights are summed
GROWTH = 8  # a pruned weight may be at most this many times as large as the largest weight of its matrix before pruning


class FixedWeights(Part):
    """Weights as fixed-point numbers, for a sum under secure aggregation.

    Attributes:
        units: by linear, the exponent e: weights are multiplied by 2^e and rounded to integers.
        clients: the largest number of clients in a sum.
    """

    units: Annotated[dict[Linear, Annotated[int, Field(ge=-256, le=256)]], Field(max_length=2**16)]
    clients: Count

    @property
    def limit(self) -> int:
        """Every |integer| of a client must be smaller than this, so that the sum fits in the ring."""
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
    """The exponent e of a linear: its weights are multiplied by 2^e and rounded to integers.

    With eight clients, 2^−e is at most 2⁻³⁹ of the largest weight. Weights of a bfloat16 model are then encoded exactly down to
    2⁻³² of the largest weight; weights of a float32 model are rounded to multiples of 2^−e.

    Args:
        before: the linear's weight before pruning.
        clients: the largest number of clients in a sum.
    """
    largest = max(float(before.abs().max()), torch.finfo(torch.float32).tiny)
    return VALUE_BITS - 2 - math.ceil(math.log2(GROWTH * clients * largest))
