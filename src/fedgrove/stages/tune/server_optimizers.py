"""Server optimizers (Reddi et al., ICLR 2021): what is made of a round's change of an adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedgrove.stages.tune.factors import Factors

MOMENTUM = 0.9  # FedAvgM's β, FedAdam's β₁
SECOND = 0.99  # FedAdam's β₂
FLOOR = 1e-6  # FedAdam's τ, in the units of a weight's change
RATES = {"average": 1.0, "momentum": 1.0, "adam": 1e-3}


@dataclass(frozen=True)
class ServerOptimizerState:
    """What an optimizer remembers of one linear.

    Attributes:
        first: the smoothed change.
        second: the smoothed mean square of the change, one number.
    """

    first: Factors
    second: float = 0.0


def step(
    kind: Literal["average", "momentum", "adam"], old: Factors, new: Factors, memory: ServerOptimizerState, rate: float | None, rank: int
) -> tuple[Factors, ServerOptimizerState]:
    """One step from ``old`` towards what the aggregation made of the round, ``new``; at most ``rank`` terms.

    FedAvg takes ``new`` (or ``rate`` of the way). FedAvgM adds the smoothed change. FedAdam divides it by the root of a
    smoothed mean square. The paper has one such number for every weight, which would need the dense product; ours is one for
    every linear.
    """
    rate = RATES[kind] if rate is None else rate
    if kind == "average" and rate == 1.0:
        return new, memory
    change = new.plus(old.scaled(-1.0))
    if kind == "average":
        return old.plus(change.scaled(rate)).compress(rank), memory
    if kind == "momentum":
        first = memory.first.scaled(MOMENTUM).plus(change).compress(rank)
        return old.plus(first.scaled(rate)).compress(rank), ServerOptimizerState(first)
    first = memory.first.scaled(MOMENTUM).plus(change.scaled(1 - MOMENTUM)).compress(rank)
    numel = old.b.shape[0] * old.a.shape[1]
    second = SECOND * memory.second + (1 - SECOND) * change.norm() ** 2 / numel
    return old.plus(first.scaled(rate / (math.sqrt(second) + FLOOR))).compress(rank), ServerOptimizerState(first, second)
