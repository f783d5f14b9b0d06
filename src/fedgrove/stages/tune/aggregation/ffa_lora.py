"""FFA-LoRA (arXiv 2403.12313): A is random, shared and frozen; only B is trained and sent, so averaging it is exact."""

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
SHARED_A = True
SERVER_OPTIMIZERS = False
DEFAULTS: Mapping[str, Any] = {"learning_rate": 1e-2}  # a random A that does not grow needs larger steps of B

__all__ = ["DEFAULTS", "EQUAL_RANKS", "SERVER_OPTIMIZERS", "SHARED_A", "TAKES", "add", "begin", "finish", "sums"]

Sum = tuple[WeightedSum, list[Factors], int]  # the sum of B, the factors of the largest rank (for the shared A), the rank


def sums(state: State[Factors], ranks: Sequence[int]) -> Sum:
    """A sum for B."""
    return WeightedSum(), [], max(ranks)


def add(sum_: Sum, factors: Factors, weight: float) -> None:
    """Adds a client's B; missing columns have weight 0."""
    b_sums, widest, rank = sum_
    has = (torch.arange(rank) < factors.rank).expand(factors.b.shape[0], rank)
    b_sums.add(torch.nn.functional.pad(factors.b.double(), (0, rank - factors.rank)), has, weight)
    if not widest or widest[0].rank < factors.rank:
        widest[:] = [factors]


def finish(state: State[Factors], sum_: Sum, options: Options) -> State[Factors]:
    """Mean(B)·A, which is the mean of the products, because A is the same for all.

    The paper has equal ranks. Ours: clients of lower rank use the first rows of the shared A, and each column is averaged over
    the clients that have it.
    """
    b_sums, widest, _ = sum_
    if not widest:
        return state
    rank = widest[0].rank
    live = Factors(b_sums.mean()[:, :rank], widest[0].a.double())
    return State(live.plus(state.live.part(rank, state.live.rank)), state.frozen)
