"""Steps along random directions of adapters: the B of LoRA adapters moves, and the weights stay as they are.

As parametrization "seeds" (:mod:`fedgrove.stages.tune.parametrizations.seeds`), with other directions. Ours: A is random, the
same for all clients and never trained; a direction is a sign for each entry of B. There are out · rank directions instead of
out · in, a step has a low rank, and the model may be held in 8 or 4 bits, whose rounding no step undoes. The result is merged
into the weights, and stands beside them as a LoRA adapter.

Of ``ranks`` the largest is taken. ``bits`` of 32 and 16 leave the weights in the checkpoint's dtype; 8 and 4 round them as
:mod:`fedgrove.stages.tune.seeds.quantized` says. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedgrove.models.cost import ModelCost
from fedgrove.stages.tune import cost as costs
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.parametrizations import seeds
from fedgrove.stages.tune.parametrizations.seeds import change_of, none, numbers, too_little

__all__ = ["change_of", "none", "numbers"]

FORM: Form = seeds.FORM
LOOP = seeds.LOOP
DISCLOSES = seeds.DISCLOSES
AGGREGATION = seeds.AGGREGATION
TRAINERS = seeds.TRAINERS
DEFAULTS: Mapping[str, Any] = {**seeds.DEFAULTS, "ranks": (8,), "bits": (32,)}
KEYS = seeds.KEYS
UNUSED = seeds.UNUSED - {"ranks", "bits"}
RANKED = False
RELATIVE = True
PRIVATE = True
PERSONAL = False
FROZEN = True
BY_WINDOWS = True
ALONE = False
SUMS_LOSS = False
CLIPPED = seeds.CLIPPED


def configurations(space: SearchSpace, cost: ModelCost, batch: int) -> list[ClientConfig]:
    """Every adapter at the largest rank, at each precision of the frozen weights, the highest first."""
    ranks = dict.fromkeys(cost.linears, space.ranks[-1])
    return [ClientConfig(bits, batch, 1, ranks) for bits in sorted(space.bits, reverse=True)]


def memory(cost: ModelCost, space: SearchSpace, config: ClientConfig) -> float:
    """As of "seeds"; a model of 8 or 4 bits is in memory besides."""
    packed = costs.weight_bytes(cost, config.bits) - 2 * cost.others if config.bits < 16 else 0.0
    return seeds.memory(cost, space, config) + packed


def compute_seconds(cost: ModelCost, space: SearchSpace, budget: Budget, config: ClientConfig) -> float:
    """As of "seeds"; the products B·A of the steps so far and of the direction take two operations for each weight and rank."""
    products = 4 * space.ranks[-1] * max(cost.multiplied, cost.parameters)
    return seeds.compute_seconds(cost, space, budget, config) + space.steps * products / budget.speed


def shortage(cost: ModelCost, space: SearchSpace, budget: Budget) -> str:
    """Even inference needs too much memory, at whichever of the allowed precisions needs least."""
    return too_little(min(memory(cost, space, one) for one in configurations(space, cost, space.batches[-1])), budget)
