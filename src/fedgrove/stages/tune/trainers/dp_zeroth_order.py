"""Zeroth-order training with differential privacy for single windows: the slope of each is clipped, their sum gets noise.

As DP-SGD (:mod:`fedgrove.stages.tune.trainers.dp_sgd`), with the same sampling and accounting, but what a window adds is one
number instead of a gradient, so that the noise hits one direction instead of all (the idea of DPZero, arXiv 2310.09639, and
DP-ZO, arXiv 2401.04343, whose texts we did not read).
"""

from __future__ import annotations

import torch

from fedgrove.errors import FedgroveError
from fedgrove.privacy.gaussian import GaussianMechanism, poisson_sample
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.seeds.steps import LOSS_BITS, Steps, Taken
from fedgrove.stages.tune.seeds.two_sided import TwoSided
from fedgrove.stages.tune.training import Work

PRIVATE = True
WITHOUT_GRADIENTS = True
FALLBACK: str | None = None
TAKES: frozenset[Form] = frozenset({"coefficients"})


def train(model: TwoSided, work: Work, settings: Steps) -> Taken:
    """Finds the slope along each direction in turn, with noise, and goes along it if ``settings.local``.

    A window whose loss is not finite adds 0. No loss is disclosed.

    Args:
        model: at the start of the round; left where its own steps lead.
        work: all windows of the client, and the budget; ``seen`` and ``seed`` are ignored.
        settings: of the round; ``batch`` is the expected number of windows of a step.

    Raises:
        FedgroveError: the noise is too small for the budget.
    """
    budget, epsilon = work.budget, settings.perturbation
    assert budget is not None
    rate = min(1.0, settings.batch / len(work.ids))
    if not budget.keeps(rate, len(settings.directions)):
        raise FedgroveError(f"noise of {budget.noise:g} is too little for epsilon = {budget.epsilon:g}; training refused")
    mechanism = GaussianMechanism(budget.clip, budget.noise, adders=1, weight=2 * epsilon, bits=LOSS_BITS)
    differences = []
    for direction in settings.directions:
        picked = poisson_sample(len(work.ids), rate)
        found = model.losses(work.ids[picked], work.labels[picked], direction, (epsilon, -epsilon))
        slopes = (found[0] - found[1]) / (2 * epsilon)
        total = torch.zeros(1, dtype=torch.int64)
        for one in slopes:  # towards zero: rounding must not enlarge what one window adds
            total += (mechanism.clip(one[None]) * 2 * epsilon * 2.0**LOSS_BITS).trunc().long()
        difference = settings.limited(int(mechanism.add_share(total)))
        model.move(direction, settings.coefficient(difference))
        differences.append(difference)
    return Taken(torch.tensor(differences, dtype=torch.int64), None, 0)
