"""The attack that a promise is measured against: was a window trained on? Told by its loss (Yeom et al., CSF 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bound(epsilon: float, delta: float) -> float:
    """The most that any attack can gain on one window under (ε, δ)-differential privacy: right guesses minus wrong ones.

    (e^ε − 1 + 2δ) / (e^ε + 1): Humphries et al., CSF 2023; Kairouz, Oh & Viswanath, ICML 2015.
    """
    return (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1)


def advantage(inside: Tensor, outside: Tensor) -> float:
    """What a threshold on the loss gains: the share of members below it minus that of others.

    The threshold that is best on one half of the windows is used on the other half, both ways round, so that noise alone
    gains nothing; the result may then be negative. It scatters by about 1/√windows.

    Args:
        inside: (windows,) losses of those that were trained on.
        outside: (windows,) losses of others of the same kind.
    """
    advantages = []
    for half in (0, 1):
        members, others = inside[half::2], outside[half::2]
        thresholds = torch.cat([members, others]).sort().values
        gains = (members <= thresholds[:, None]).double().mean(1) - (others <= thresholds[:, None]).double().mean(1)
        threshold = thresholds[gains.argmax()]
        members, others = inside[1 - half :: 2], outside[1 - half :: 2]
        advantages.append(float((members <= threshold).double().mean() - (others <= threshold).double().mean()))
    return sum(advantages) / 2
