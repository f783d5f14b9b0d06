"""Server optimizers (Reddi et al., ICLR 2021): apply a round's aggregated change to the server's state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Literal

from fedgrove.stages.tune.changes import C

MOMENTUM = 0.9  # FedAvgM's β, FedAdam's β₁
SECOND = 0.99  # FedAdam's β₂
FLOOR = 1e-6  # FedAdam's τ, in the units of a weight's change
LEARNING_RATES = {"average": 1.0, "momentum": 1.0, "adam": 1e-3}


@dataclass(frozen=True)
class ServerOptimizerState(Generic[C]):
    """A server optimizer's state for one linear.

    Attributes:
        first: "momentum": Σ β^age · change over the rounds; "adam": the moving average of the change (first moment).
        second: the moving average of the change's mean square (second moment), one number; only "adam".
    """

    first: C
    second: float = 0.0


def step(
    kind: Literal["average", "momentum", "adam"],
    old: C,
    new: C,
    state: ServerOptimizerState[C],
    learning_rate: float | None,
    rank: int,
) -> tuple[C, ServerOptimizerState[C]]:
    """One step from ``old``, the state before the round, with the change to ``new``, the aggregation's result.

    "average" (FedAvg) adds ``learning_rate`` · change; with learning rate 1 it returns ``new`` itself. "momentum"
    (FedAvgM) adds ``learning_rate`` · first. "adam" (FedAdam, without bias correction) adds ``learning_rate`` · first /
    (√second + τ). In the paper the second moment exists per weight, which would need the dense product; ours is one
    number per linear.

    Args:
        learning_rate: None: ``LEARNING_RATES[kind]``.
        rank: results are compressed to at most this many terms, except by "average" with learning rate 1.

    Returns:
        The new change, and the optimizer's state for the next round.
    """
    rate = LEARNING_RATES[kind] if learning_rate is None else learning_rate
    if kind == "average" and rate == 1.0:
        return new, state
    change = new.plus(old.scaled(-1.0))
    if kind == "average":
        return old.plus(change.scaled(rate)).compress(rank), state
    if kind == "momentum":
        first = state.first.scaled(MOMENTUM).plus(change).compress(rank)
        return old.plus(first.scaled(rate)).compress(rank), ServerOptimizerState(first)
    first = state.first.scaled(MOMENTUM).plus(change.scaled(1 - MOMENTUM)).compress(rank)
    second = SECOND * state.second + (1 - SECOND) * change.norm() ** 2 / change.numel()
    return old.plus(first.scaled(rate / (math.sqrt(second) + FLOOR))).compress(rank), ServerOptimizerState(first, second)
