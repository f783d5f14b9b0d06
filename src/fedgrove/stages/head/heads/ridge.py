"""Ridge regression of the labels, as ones and zeros, on the features; the mean is not penalized (Hoerl & Kennard 1970).

In federated learning: Fed3R (Fanì et al., *Accelerating Heterogeneous Federated Learning with Closed-form Classifiers*, ICML
2024), without its tuning of the model afterwards. Scores are linear estimates of p(y | x) and add up to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.stages.head.heads import Linear

PRODUCTS = True


def records_needed(classes: int, features: int) -> int:
    """One of each class."""
    return classes


def solve(moments: Moments, ridge: float) -> Linear:
    """(T + λD)⁻¹ C: T the covariance of the features, D its diagonal, C their covariance with the labels."""
    frequencies, mean = moments.frequencies(), moments.mean()
    with_labels = frequencies[:, None] * (moments.means() - mean)
    total = moments.covariance() + torch.diag(ridge * moments.variances())
    weight = torch.linalg.solve(total, with_labels.T).T
    return Linear(weight, frequencies - weight @ mean)


def reweigh(linear: Linear, before: Tensor, after: Tensor) -> Linear:
    """Multiplies the scores by p'(y) / p(y). They add up to 1, so the highest is positive, before and after.

    A score below 0 counts as impossible, however frequent the label is at the owner.
    """
    ratio = after / before
    return Linear(linear.weight * ratio[:, None], linear.bias * ratio)
