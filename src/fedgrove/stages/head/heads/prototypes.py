"""The nearest class mean, as in pFedPM (arXiv 2406.16583) and FedProto (Tan et al., AAAI 2022).

From the papers: clients send the mean feature of each class, the server averages them, and a record gets the class whose mean
is nearest. Ours: sums instead of means, so that each record counts once; every feature is divided by its standard deviation
within the classes; an owner's own class frequencies instead of a mixture of its own and the common means. pFedPM's learnt
comparison of feature and mean, and FedProto's training of the features, are left out: the model is frozen.

As a log-likelihood this assumes independent features. They are not, so the differences between scores are too large, and
frequencies of labels move them too little. Where that matters, use ``ridge`` or ``discriminant``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.stages.head.heads import Linear

PRODUCTS = False


def records_needed(classes: int, features: int) -> int:
    """One of each class."""
    return classes


def solve(moments: Moments, ridge: float) -> Linear:
    """−½ Σ (x − μ)²/v without the part that all classes share: μ/v · x − ½ Σ μ²/v."""
    variance = moments.within_variances() + ridge * moments.variances()
    means = moments.means()
    weight = means / variance
    return Linear(weight, -0.5 * (weight * means).sum(1))


def reweigh(linear: Linear, before: Tensor, after: Tensor) -> Linear:
    """Adds log p'(y): the scores are log-likelihoods, whatever the frequencies were."""
    return Linear(linear.weight, linear.bias + torch.log(after))
