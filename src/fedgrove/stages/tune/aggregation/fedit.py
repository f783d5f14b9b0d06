"""FedIT (arXiv 2305.05644): averages A and B separately. The baseline of the other aggregations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.stages.tune.aggregation import Form, Options
from fedgrove.stages.tune.aggregation import leading as begin
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.factors import Factors

TAKES: frozenset[Form] = frozenset({"factors"})
EQUAL_RANKS = False
SHARED_A = False
SERVER_OPTIMIZERS = False
DEFAULTS: Mapping[str, Any] = {}

__all__ = ["EQUAL_RANKS", "SERVER_OPTIMIZERS", "SHARED_A", "TAKES", "add", "begin", "finish", "sums"]

Pair = tuple[WeightedSum, WeightedSum, int]


def sums(state: State[Factors], ranks: Sequence[int]) -> Pair:
    """A sum for each factor."""
    return WeightedSum(), WeightedSum(), max(ranks)


def add(pair: Pair, factors: Factors, weight: float) -> None:
    """Adds a client's factors; missing terms have weight 0."""
    b_sums, a_sums, rank = pair
    missing = rank - factors.rank
    has = torch.arange(rank) < factors.rank
    b = torch.nn.functional.pad(factors.b.double(), (0, missing))
    a = torch.nn.functional.pad(factors.a.double(), (0, 0, 0, missing))
    b_sums.add(b, has.expand_as(b), weight)
    a_sums.add(a, has[:, None].expand_as(a), weight)


def finish(state: State[Factors], pair: Pair, options: Options) -> State[Factors]:
    """The weighted means.

    Mean(B)·mean(A) is not the mean of the products B·A; the error grows with the differences between the clients. The paper
    has equal ranks. Ours: with unequal ranks each term is averaged over the clients that have it; zero-padding and dividing by
    all clients would shrink terms that few clients have.
    """
    b_sums, a_sums, rank = pair
    if b_sums.value is None:
        return state
    live = Factors(b_sums.mean(), a_sums.mean())
    return State(live.plus(state.live.part(rank, state.live.rank)), state.frozen)
