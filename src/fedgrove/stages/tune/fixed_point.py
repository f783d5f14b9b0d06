"""Adapters with a shared frozen factor as whole numbers: a sum that is exact, that can be taken unseen, and that takes noise.

With one A for all (aggregation ``ffa_lora``) the mean of the clients' adapters is a plain sum of their B's. Here it is a sum of
whole multiples of 2⁻²⁴ of (weight · what B changed by) in 32-bit words: the same bits in the open and under secure
aggregation, whoever is added first. Weights are public and add up to at most one, so the sum needs no more room than one
client. Everybody sends the columns that the widest client trains, those that it does not train as zeros: shapes tell
nothing. The loss, and the scores of the linears, go the same way.

FFA-LoRA (arXiv 2403.12313) names exact means and privacy as what one frozen factor is good for; words and weights are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.privacy.accounting import gaussian_noise_multiplier
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds.wire import CHANGE, WireError

BITS = 24  # after the point
LARGEST = 64  # of any number before it is weighted
LOSS = "loss"


def encode(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """A client's numbers, weighted, as int32; rounded towards zero, so that no norm grows.

    Args:
        values: by name.
        share: the client's weight in the sum; those of all clients add up to one at most.

    Raises:
        FedgroveError: a value is not finite or not between ±``LARGEST``.
    """
    for name, value in values.items():
        if not (value.abs() < LARGEST).all():
            raise FedgroveError(f"{name}: what it learnt is not finite or past {LARGEST}; lower learning_rate")
    return {CHANGE + name: (value.double() * share * 2.0**BITS).trunc().int() for name, value in values.items()}


def mechanism(noise: Mapping[str, Any], share: float) -> GaussianMechanism:
    """The noise that protects a whole client; the same for the client, which clips its change, and for the server.

    Args:
        noise: ``epsilon``, ``delta``; ``bound``, the largest norm of a client's change; ``rounds``, in how many sums it is;
            ``adders``, how many clients share the noise, 0: the server adds it.
        share: every client's weight in the sum.
    """
    noise_multiplier = gaussian_noise_multiplier(noise["epsilon"], noise["delta"], noise["rounds"])
    return GaussianMechanism(noise["bound"], noise_multiplier, noise["adders"], weight=share, bits=BITS)


def padded(change: Tensor, widest: int) -> Tensor:
    """The change of a B (out, rank), with zeros for the columns that others train: (out, widest)."""
    return torch.nn.functional.pad(change, (0, widest - change.shape[1]))


def check(tensors: Mapping[str, Tensor], share: float) -> None:
    """Refuses numbers that no client of that weight, or no sum of such clients, can have sent.

    Raises:
        WireError: one is too large.
    """
    for name, tensor in tensors.items():
        if (tensor.long().abs() > share * LARGEST * 2.0**BITS).any():
            raise WireError(f"{name} is out of range")


def mean(total: Tensor, weight: Tensor | float) -> Tensor:
    """Σ weight·value / Σ weight in float64 from the sum of what :func:`encode` made; 0 where nobody has weight.

    Args:
        total: whole numbers.
        weight: of those who are in the sum: one number, or one for each column.
    """
    value = total.double() * 2.0**-BITS
    weight = torch.as_tensor(weight, dtype=torch.float64)
    return torch.where(weight > 0, value / weight.clamp(min=1e-300), torch.zeros_like(value))


def facts(share: float, ranks: Mapping[str, int], noise: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a client is told: its weight, the columns to send for each linear, and the noise that protects a client."""
    return {"share": share, "ranks": dict(ranks), "noise": noise}
