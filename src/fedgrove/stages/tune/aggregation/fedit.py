"""FedIT (arXiv 2305.05644): the mean of A and the mean of B, each on its own. The baseline that the others improve on."""

from __future__ import annotations

from collections.abc import Sequence

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

__all__ = ["EQUAL_RANKS", "SERVER_OPTIMIZERS", "SHARED_A", "TAKES", "add", "begin", "finish", "sums"]

Pair = tuple[WeightedSum, WeightedSum, int]


def sums(state: State[Factors], ranks: Sequence[int]) -> Pair:
    """A sum for each factor."""
    return WeightedSum(), WeightedSum(), max(ranks)


def add(pair: Pair, factors: Factors, weight: float) -> None:
    """Adds a client's factors; terms that it does not have weigh nothing."""
    b_sums, a_sums, rank = pair
    missing = rank - factors.rank
    has = torch.arange(rank) < factors.rank
    b = torch.nn.functional.pad(factors.b.double(), (0, missing))
    a = torch.nn.functional.pad(factors.a.double(), (0, 0, 0, missing))
    b_sums.add(b, has.expand_as(b), weight)
    a_sums.add(a, has[:, None].expand_as(a), weight)


def finish(state: State[Factors], pair: Pair, options: Options) -> State[Factors]:
    """The weighted means.

    Mean(B)·mean(A) is not the mean of the products B·A; how far it is off grows with the differences between the clients.
    The paper has equal ranks. Ours: with unequal ranks each term is the mean over those who have it, so padding does not
    dilute the terms of few (zero-padding with all in the denominator would).
    """
    b_sums, a_sums, rank = pair
    if b_sums.value is None:
        return state
    live = Factors(b_sums.mean(), a_sums.mean())
    return State(live.plus(state.live.part(rank, state.live.rank)), state.frozen)
