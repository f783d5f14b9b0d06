"""Changes as fixed-point numbers: their sum is exact, can be computed under secure aggregation, and can get noise.

If the changes of a round can be added (LoRA with one A shared by all clients, or tensors that are averaged directly),
the mean of the clients' changes is a weighted sum. Each client encodes weight · change as int32 multiples of 2⁻²⁴. The
sum has the same bits in the open and under secure aggregation, in any order of the clients. Weights are public and add
up to at most 1, so the sum needs no more bits than one client's numbers. Every client sends as many columns as the
client with the largest rank, with zeros for those that it does not train, so shapes reveal nothing. The loss and the
scores of the linears are summed in the same way.

From FFA-LoRA (arXiv 2403.12313): freezing one factor makes the mean exact and suits differential privacy. Ours: the
fixed-point numbers and the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.job.units import Clip, Count, CountOrZero, Delta, Epsilon, Linear, Natural
from fedgrove.privacy.accounting import gaussian_noise_multiplier
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds.aggregator.fixed_point import FixedPoint, OutOfRange
from fedgrove.rounds.request import CHANGE, Part, Tensors
from fedgrove.rounds.wire import WireError

BITS = 24  # after the binary point
LARGEST = 64  # every |value| must be smaller, before it is multiplied by the weight
CODE = FixedPoint(BITS, torch.int32, toward_zero=True)
LOSS = "loss"


class ClientNoise(Part):
    """Differential privacy of a whole client: its change is clipped, and the sum of a round gets noise.

    Attributes:
        epsilon, delta: the privacy budget of all rounds together.
        clip: the largest L2 norm of a client's change; larger changes are scaled down.
        rounds: number of rounds that the budget is for.
        adders: the smallest number of clients in a secure sum, who share the noise; 0: the server adds it.
    """

    epsilon: Epsilon
    delta: Delta
    clip: Clip
    rounds: Count
    adders: CountOrZero

    def mechanism(self, weight: float) -> GaussianMechanism:
        """The mechanism for both sides: the client clips and adds its share of the noise, or the server adds all of it.

        Args:
            weight: of one client in the sum.
        """
        multiplier = gaussian_noise_multiplier(self.epsilon, self.delta, self.rounds)
        return GaussianMechanism(self.clip, multiplier, self.adders, weight=weight, bits=BITS)


class FixedPointChanges(Part):
    """The settings of clients that send fixed-point numbers: the same for all of a sum.

    Attributes:
        everything: the tokens of all clients, up to ``most`` of each; with noise, the number of clients. A client's weight
            in the sum is its own part of it, so the server cannot give one client more and the others less.
        most: the largest number of a client's tokens that counts.
        widest: by linear, the largest rank of any client; with LoRA, how many columns to send.
        noise: the noise that protects a client; None: no noise.
    """

    everything: Natural
    most: Natural
    widest: Annotated[dict[Linear, Count], Field(max_length=2**18)]
    noise: ClientNoise | None = None

    def weight(self, tokens: int) -> float:
        """The weight of a client with so many tokens; the weights of all clients add up to at most 1."""
        return (1 if self.noise is not None else min(tokens, self.most)) / self.everything


def encode(values: Mapping[str, Tensor], weight: float) -> Tensors:
    """Encodes weight · value as int32 multiples of 2⁻²⁴, rounded towards zero so that no norm grows.

    Args:
        values: by name, any shapes, floats.
        weight: the client's weight in the sum.

    Raises:
        OutOfRange: a value is not finite or not between ±``LARGEST``.
    """
    for name, value in values.items():
        if not (value.abs() < LARGEST).all():
            raise OutOfRange(f"{name}: its change is not finite, or not below {LARGEST}; lower learning_rate")
    return {CHANGE + name: CODE.encode(value.double() * weight) for name, value in values.items()}


def fixed_loss(loss: float) -> Tensor:
    """A loss as one of the values of :func:`encode`, (1,)."""
    return torch.tensor([min(loss, LARGEST - 1.0)])


def check(tensors: Mapping[str, Tensor], weight: float) -> None:
    """Checks that no number is larger than a client of this weight, or clients of this total weight, can send.

    Raises:
        WireError: a number is too large.
    """
    for name, tensor in tensors.items():
        if (tensor.long().abs() > weight * LARGEST * 2.0**BITS).any():
            raise WireError(f"{name} is out of range")


def check_floats(tensors: Mapping[str, Tensor]) -> None:
    """Checks that floats are within the range of fixed-point numbers, so that a client can do no more by sending floats.

    Raises:
        WireError: a number is too large.
    """
    for name, tensor in tensors.items():
        if (tensor.abs() > LARGEST).any():
            raise WireError(f"{name} has numbers larger than {LARGEST}")


def mean(total: Tensor, weight: Tensor | float) -> Tensor:
    """Σ weight·value / Σ weight in float64; 0 where Σ weight is 0.

    Args:
        total: the sum of the clients' results of :func:`encode`.
        weight: Σ weight over the clients in the sum: one number, or one per column.
    """
    value = CODE.decode(total)
    weight = torch.as_tensor(weight, dtype=torch.float64)
    return torch.where(weight > 0, value / weight.clamp(min=1e-300), torch.zeros_like(value))
