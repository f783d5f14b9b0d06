"""The settings that a request to train carries, as they travel; every field has bounds."""

from __future__ import annotations

from typing import Literal

from fedgrove.client.local_client import LocalClient
from fedgrove.job.units import Clip, Count, Delta, Epsilon, NonNegative, Positive
from fedgrove.rounds.request import Part
from fedgrove.stages.tune.fixed_point import ClientNoise


class Training(Part):
    """How a client trains in a round; see :class:`fedgrove.stages.tune.training.Settings`."""

    steps: Count
    batch: Count
    micro: Count
    learning_rate: NonNegative
    optimizer: Literal["adamw", "sgd"]
    max_grad_norm: NonNegative
    proximal: NonNegative


class WindowNoise(Part):
    """Differential privacy of a client's windows; see :class:`fedgrove.stages.tune.training.Budget`."""

    epsilon: Epsilon
    delta: Delta
    noise: Positive
    rounds: Count
    clip: Clip
    gate: bool = False


def check_noise(windows: WindowNoise | None, of_client: ClientNoise | None, round_: int, client: LocalClient) -> None:
    """Refuses a round beyond the privacy budget, and noise that the server would add under secure aggregation."""
    if client.credentials is not None and of_client and not of_client.adders:
        raise client.error("under secure aggregation the clients add the noise, but this request leaves it to the server")
    noise = windows or of_client
    if noise and not round_ < noise.rounds:
        raise client.error(f"round {round_ + 1} of {noise.rounds}: its privacy budget is spent")
