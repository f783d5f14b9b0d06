"""Fixed-point integers for sums: exact in any order, and the only numbers that secure aggregation can sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError


class OutOfRange(FedgroveError):
    """A number that is not finite, or too large for its sum."""


@dataclass(frozen=True)
class FixedPoint:
    """Represents numbers as integer multiples of 2^−fraction_bits.

    >>> code = FixedPoint(fraction_bits=2)
    >>> code.encode(torch.tensor([0.5, -1.26]), limit=100)
    tensor([ 2, -5])
    >>> code.decode(torch.tensor([2, -5]))
    tensor([ 0.5000, -1.2500], dtype=torch.float64)

    Attributes:
        fraction_bits: bits after the binary point.
        dtype: of the integers: int64, or int32 for half of the bytes.
        toward_zero: round towards zero, so that no norm grows; else to the nearest.
    """

    fraction_bits: int
    dtype: torch.dtype = torch.int64
    toward_zero: bool = False

    def encode(self, values: Tensor, limit: float | None = None) -> Tensor:
        """Converts floats to integers.

        Args:
            values: any shape.
            limit: every |value|·2^fraction_bits must be smaller; None: not checked, the caller ensures that all are
                finite and fit.

        Returns:
            The shape of ``values``, in ``dtype``.

        Raises:
            OutOfRange: a value is too large, or not finite.
        """
        scaled = values.double() * 2.0**self.fraction_bits
        if limit is not None and not (scaled.abs() < limit).all():
            raise OutOfRange("a number is not finite, or too large to be summed")
        return (scaled.trunc_() if self.toward_zero else scaled.round_()).to(self.dtype)

    def encode_sum(self, values: Tensor, limit: float) -> Tensor:
        """Rounds each row to the nearest integers and sums the rows: the total is the same whichever client has a row.

        Args:
            values: (rows, n).
            limit: the sum of the |integers| of every column must be smaller.

        Returns:
            (n,) integers.

        Raises:
            OutOfRange: a sum is too large, or a value is not finite.
        """
        whole = (values.double() * 2.0**self.fraction_bits).round_()
        if not (whole.abs().sum(0) < limit).all():
            raise OutOfRange("a sum is not finite, or too large")
        return whole.to(self.dtype).sum(0)

    def decode(self, total: Tensor) -> Tensor:
        """Converts integers to float64."""
        return total.double() * 2.0**-self.fraction_bits
