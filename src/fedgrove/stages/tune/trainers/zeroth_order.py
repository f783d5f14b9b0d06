"""Zeroth-order training: the losses on both sides of the model along a random direction give the step along it.

From MeZO (arXiv 2305.17333) and FedKSeed (arXiv 2312.06353): two forward passes, and no backward pass. A step whose loss
is not finite is skipped, as in both; ours: it is counted, and after three in a row training stops.
"""

from __future__ import annotations

import torch

from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.seeds.steps import Steps, Taken, whole
from fedgrove.stages.tune.seeds.two_sided import TwoSided
from fedgrove.stages.tune.training import NotFinite, Work, draw

PRIVATE = False
WITHOUT_GRADIENTS = True
FALLBACK: str | None = None
TAKES: frozenset[Form] = frozenset({"coefficients"})
MOST_SKIPPED = 3  # steps in a row


def train(model: TwoSided, work: Work, settings: Steps) -> Taken:
    """Finds the slope along each direction in turn, and goes along it if ``settings.local``.

    Args:
        model: at the start of the round; left where its own steps lead.
        work: all windows of the client; ``masks``, ``devices`` and ``budget`` are ignored.
        settings: of the round.

    Raises:
        NotFinite: the loss of ``MOST_SKIPPED`` steps in a row is not finite.
    """
    batches = draw(work.ids, work.labels, settings.batch, work.seen, work.seed)
    differences, losses, in_a_row = [], [], 0
    epsilon = settings.perturbation
    for direction in settings.directions:
        ids, labels = next(batches)
        found = model.losses(ids, labels, direction, (epsilon, -epsilon))
        if not bool(torch.isfinite(found).all()):
            differences.append(0)
            in_a_row += 1
            if in_a_row == MOST_SKIPPED:
                raise NotFinite(
                    f"its loss is not finite in {in_a_row} steps in a row",
                    "lower learning_rate or perturbation, or check its data",
                )
            continue
        in_a_row = 0
        above, below = whole(found)
        difference = settings.limited(int(settings.clipped(above - below).sum()))
        model.move(direction, settings.coefficient(difference))
        differences.append(difference)
        losses.append(float(found.mean()))
    loss = sum(losses) / len(losses) if losses else None
    return Taken(torch.tensor(differences, dtype=torch.int64), loss, len(differences) - len(losses))
