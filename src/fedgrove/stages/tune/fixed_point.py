"""Changes as fixed-point numbers: their sum is exact, can be taken under masks, and takes noise.

Where what a round changed adds up (with one A for all, or with tensors that are averaged as they are), the mean of the clients'
changes is a plain sum. Here it is a sum of integer multiples of 2⁻²⁴ of (weight · what changed) in 32-bit words: the same bits
in the open and under secure aggregation, whoever is added first. Weights are public and add up to at most one, so the sum needs
no
more room than one client. Everybody sends the columns that the widest client trains, those that it does not train as zeros:
shapes reveal nothing. The loss, and the scores of the linears, go the same way.

FFA-LoRA (arXiv 2403.12313) names exact means and privacy as what one frozen factor is good for; words and weights are ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedgrove.privacy.accounting import gaussian_noise_multiplier
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds.aggregator.fixed_point import FixedPoint, OutOfRange
from fedgrove.rounds.request import CHANGE, Tensors
from fedgrove.rounds.wire import WireError

BITS = 24  # after the point
LARGEST = 64  # of any number before it is weighted
CODE = FixedPoint(BITS, torch.int32, toward_zero=True)
LOSS = "loss"


class ClientNoise(BaseModel):
    """Differential privacy of a whole client: its change is clipped, and the sum of a round gets noise.

    Attributes:
        epsilon, delta: what all rounds together may spend.
        clip: the largest norm of a client's change.
        rounds: how many there are.
        adders: clients that share the noise, under secure aggregation; 0: the server adds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: float
    delta: float
    clip: float
    rounds: int
    adders: int

    def mechanism(self, weight: float) -> GaussianMechanism:
        """Both halves: clip and add a share at the client, or add all of the noise at the server.

        Args:
            weight: of a client in the sum.
        """
        multiplier = gaussian_noise_multiplier(self.epsilon, self.delta, self.rounds)
        return GaussianMechanism(self.clip, multiplier, self.adders, weight=weight, bits=BITS)


class FixedPointChanges(BaseModel):
    """What a client that sends fixed-point numbers needs to know.

    Attributes:
        weight: its weight in the sum; those of all clients add up to one at most.
        widest: by linear, the columns to send.
        noise: that protects a client; None: none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float
    widest: dict[str, int]
    noise: ClientNoise | None = None


def encode(values: Mapping[str, Tensor], weight: float) -> Tensors:
    """A client's numbers, weighted, as int32; rounded towards zero, so that no norm grows.

    Args:
        values: by name.
        weight: the client's weight in the sum.

    Raises:
        OutOfRange: a value is not finite or not between ±``LARGEST``.
    """
    for name, value in values.items():
        if not (value.abs() < LARGEST).all():
            raise OutOfRange(f"{name}: what it learnt is not finite or past {LARGEST}; lower learning_rate")
    return {CHANGE + name: CODE.encode(value.double() * weight) for name, value in values.items()}


def check(tensors: Mapping[str, Tensor], weight: float) -> None:
    """Refuses numbers that no client of that weight, or no sum of such clients, can have sent.

    Raises:
        WireError: one is too large.
    """
    for name, tensor in tensors.items():
        if (tensor.long().abs() > weight * LARGEST * 2.0**BITS).any():
            raise WireError(f"{name} is out of range")


def mean(total: Tensor, weight: Tensor | float) -> Tensor:
    """Σ weight·value / Σ weight in float64 from the sum of what :func:`encode` made; 0 where nobody has weight.

    Args:
        total: fixed-point numbers.
        weight: of those who are in the sum: one number, or one for each column.
    """
    value = CODE.decode(total)
    weight = torch.as_tensor(weight, dtype=torch.float64)
    return torch.where(weight > 0, value / weight.clamp(min=1e-300), torch.zeros_like(value))
