"""The settings that a request to train carries, as they travel; every field has bounds."""

from __future__ import annotations

from typing import Literal

from fedgrove.job.units import Clip, Count, Delta, Epsilon, NonNegative, Positive
from fedgrove.rounds.request import Part


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
