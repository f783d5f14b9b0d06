"""Exact slopes along a round's directions, by backward passes: of clients that have the memory, among those that have not.

Ours: where no model moves within a round, a slope by differences, (L₊ − L₋)/(2ε), and the derivative ⟨∇L, z⟩ are the same
number up to O(ε²), so they add up. A gradient serves all directions at once, so here every slope is the mean over all windows
of the round and not only over those of one step: it has less noise, for one and a half times the time.

A window's slopes are not clipped one by one, as by differences, but the mean is.
"""

from __future__ import annotations

import torch

from fedgrove.models.cost import ModelCost
from fedgrove.stages.tune import cost as costs
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.seeds.steps import LOSS_BITS, Steps, Taken
from fedgrove.stages.tune.seeds.two_sided import TwoSided
from fedgrove.stages.tune.training import NotFinite, Work, draw

PRIVATE = False
WITHOUT_GRADIENTS = False
FALLBACK: str | None = "zeroth_order"
TAKES: frozenset[Form] = frozenset({"coefficients"})
PER_WEIGHT = 12  # bytes


def train(model: TwoSided, work: Work, settings: Steps) -> Taken:
    """Finds the slope along every direction at once, where the model is.

    Args:
        model: at the start of the round, where it stays.
        work: all windows of the client; ``masks``, ``devices`` and ``budget`` are ignored.
        settings: of the round; not ``local``.

    Returns:
        Differences of losses as they would be at distance ε.

    Raises:
        NotFinite: no loss is finite.
    """
    batches = draw(work.ids, work.labels, settings.batch, work.seen, work.seed)
    ids, labels = (torch.cat(parts) for parts in zip(*(next(batches) for _ in settings.directions), strict=True))
    slopes, losses = model.slopes(ids, labels, settings.directions)
    finite = torch.isfinite(losses)
    if not bool(finite.any()):
        raise NotFinite("its loss is not finite", "lower learning_rate, or check its data")
    mean = slopes / int(finite.sum())
    if settings.max_slope:
        mean = mean.clamp(-settings.max_slope, settings.max_slope)
    differences = (mean * settings.batch * 2 * settings.perturbation * 2.0**LOSS_BITS).round().long().tolist()
    limited = [settings.limited(one) for one in differences]
    return Taken(torch.tensor(limited, dtype=torch.int64), float(losses[finite].mean()), 0)


def memory(cost: ModelCost) -> float:
    """Each weight as it was and as it is, and its gradient, with the activations of one window."""
    return costs.full_memory(cost, 1, PER_WEIGHT)


def compute_seconds(cost: ModelCost, windows: int, speed: float) -> float:
    """A backward pass takes the time of two forward passes."""
    return windows * costs.full_operations(cost) / speed
