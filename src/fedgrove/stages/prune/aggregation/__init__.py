"""Rules: the two ends of the sum. Both halves of one federated idea live in one file; its name is its name in the job.

An aggregation for pruning on the clients holds two functions, tensor by tensor:

    weigh(before, after, mask, tokens) -> (change, weight)     on the client: what is put into the sum
    finish(before, sums, target, options) -> (weight, mask)    on the server: what is made of the sum

``before`` is the tensor as the round began, ``after`` and ``mask`` what the pruner made of it (True = kept), ``tokens``
the number of calibration tokens, ``sums`` the :class:`~fedgrove.rounds.aggregator.weighted_sum.WeightedSum` of this tensor. ``change`` is a tensor
or None (nothing but the weight is sent); ``weight`` is a bool mask or one number. Tensors lie as the linear multiplies:
(out, in).

Under secure aggregation only whole numbers can be summed: :func:`to_integers` and :func:`from_integers` are between the
two halves then, for rules whose weight is a mask.

The aggregation ``pooled`` is of another kind: clients do not prune, they send what the pruner needs to know, so its two halves
are about inputs and not about weights. See :mod:`fedgrove.stages.prune.aggregation.pooled`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum

VALUE_BITS = 48  # of the ring in which masked weights are summed
GROWTH = 8  # a pruner may make a weight at most so many times larger than the largest one of its matrix


@dataclass(frozen=True)
class Options:
    """What a job may say to an aggregation (see ``[[stages]]`` in the job file)."""

    shrink: float = 0.0
    expand: bool = True


def unit_of(before: Tensor, clients: int) -> int:
    """The exponent of two by which a linear's weights are multiplied to make whole numbers of them.

    With eight clients the unit is 2⁻³⁹ of the largest weight: the values of a bfloat16 model travel as they are down to
    2⁻³² of the largest, those of a float32 model lose what lies below 2⁻³⁹.

    Args:
        before: the linear's weight.
        clients: how many at most are summed.
    """
    largest = max(float(before.abs().max()), torch.finfo(torch.float32).tiny)
    return VALUE_BITS - 2 - math.ceil(math.log2(GROWTH * clients * largest))


def to_integers(change: Tensor | None, weight: Tensor, unit: int, clients: int) -> tuple[Tensor | None, Tensor]:
    """What an aggregation's ``weigh`` made, for secure aggregation: values in fixed point (int64), the mask as 0 and 1 (uint8).

    Raises:
        FedgroveError: a value is not finite, or so large that the sum could overflow.
    """
    kept = weight.to(torch.uint8)
    if change is None:
        return None, kept
    values = change.double() * 2.0**unit
    if not (values.abs() < 2 ** (VALUE_BITS - 2) // clients).all():
        raise FedgroveError(f"a pruned weight is more than {GROWTH} times the largest one before; give the pruner more samples")
    return values.round().long(), kept


def from_integers(change: Tensor | None, weight: Tensor, unit: int, clients: int) -> WeightedSum:
    """The sum of what :func:`to_integers` made at so many clients, as an aggregation's ``finish`` reads it."""
    return WeightedSum(None if change is None else change.double() * 2.0**-unit, weight.double(), float(clients))
