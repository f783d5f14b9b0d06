"""Linear discriminant analysis (Fisher 1936; Hastie, Tibshirani & Friedman, *The Elements of Statistical Learning*, 4.3).

Classes are Gaussians with one covariance W: score = μᵀ W⁻¹ x − ½ μᵀ W⁻¹ μ + log p(y). W is that of the pooled records within
their classes, from sums. It needs as many records as there are features and classes together: with fewer, W has no full rank,
and the ridge alone decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.stages.head.heads import Linear

PRODUCTS = True


def records_needed(classes: int, features: int) -> int:
    """So many that the covariance within the classes can have full rank."""
    return classes + features


def solve(moments: Moments, ridge: float) -> Linear:
    """See the top of this file; the ridge is added to W."""
    means = moments.means()
    within = moments.within() + torch.diag(ridge * moments.variances())
    weight = torch.linalg.solve(within, means.T).T
    return Linear(weight, torch.log(moments.frequencies()) - 0.5 * (weight * means).sum(1))


def reweigh(linear: Linear, before: Tensor, after: Tensor) -> Linear:
    """Adds log p'(y) − log p(y)."""
    return Linear(linear.weight, linear.bias + torch.log(after) - torch.log(before))
