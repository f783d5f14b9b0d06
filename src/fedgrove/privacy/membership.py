"""Membership inference by a threshold on the loss (Yeom et al., CSF 2018), to check a privacy guarantee empirically."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bound(epsilon: float, delta: float) -> float:
    """The largest advantage (true minus false positive rate) of any attack on one window under (ε, δ)-privacy.

    It is (e^ε − 1 + 2δ) / (e^ε + 1): Humphries et al., CSF 2023; Kairouz, Oh & Viswanath, ICML 2015.
    """
    return (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1)


def advantage(inside: Tensor, outside: Tensor) -> float:
    """The advantage of a threshold on the loss: the fraction of members at or below it minus that of non-members.

    The best threshold of one half of the windows is applied to the other half, and the reverse, so that chance alone
    gives no advantage on average. The result can therefore be negative; its standard deviation is about 1/√windows.

    Args:
        inside: (windows,) losses of windows that were trained on.
        outside: (windows,) losses of windows of the same kind that were not.
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
