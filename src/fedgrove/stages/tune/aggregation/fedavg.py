"""FedAvg (McMahan et al., AISTATS 2017): the weighted mean of the clients' changes, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.stages.tune.aggregation import Form, Options
from fedgrove.stages.tune.changes import Change, Start, State

TAKES: frozenset[Form] = frozenset({"tensors"})
EQUAL_RANKS = False
SHARED_A = False
SERVER_OPTIMIZERS = True
DEFAULTS: Mapping[str, Any] = {}

C = TypeVar("C", bound=Change)


def begin(state: State[C], rank: int) -> Start[C]:
    """Every client starts from the server's state."""
    return Start(state.live, state.frozen)


def sums(state: State[C], ranks: Sequence[int]) -> dict[str, WeightedSum]:
    """One weighted sum for each tensor of the change."""
    return {}


def add(sums: dict[str, WeightedSum], change: C, weight: float) -> None:
    """Adds one client's change in this round, weighted by its tokens."""
    for part, tensor in change.parts().items():
        sums.setdefault(part, WeightedSum()).add(tensor, weight)


def finish(state: State[C], sums: dict[str, WeightedSum], options: Options) -> State[C]:
    """Adds the mean change of the round to the state."""
    if not sums:
        return state
    mean = type(state.live).of({part: total.mean() for part, total in sums.items()})
    return State(state.live.plus(mean), state.frozen)
