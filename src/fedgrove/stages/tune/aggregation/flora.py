"""FLoRA (arXiv 2409.05976): every round fresh adapters on the merged base; their stack is the exact mean."""

from __future__ import annotations

from collections.abc import Sequence

from fedgrove.stages.tune.aggregation import Form, Options
from fedgrove.stages.tune.changes import Start, State
from fedgrove.stages.tune.factors import Factors, ProductSum

TAKES: frozenset[Form] = frozenset({"factors"})
EQUAL_RANKS = False
SHARED_A = False
SERVER_OPTIMIZERS = False


def begin(state: State[Factors], rank: int) -> Start[Factors]:
    """Nothing to go on with: a fresh adapter on everything that was learnt so far."""
    return Start(state.live.part(0, 0), state.total())


def sums(state: State[Factors], ranks: Sequence[int]) -> ProductSum:
    """One sum of products."""
    return ProductSum(state.live.b.shape[0], state.live.a.shape[1])


def add(sum_: ProductSum, factors: Factors, weight: float) -> None:
    """Adds a client's product."""
    sum_.add(factors, weight)


def finish(state: State[Factors], sum_: ProductSum, options: Options) -> State[Factors]:
    """What was learnt before plus the mean of the products: exact at any ranks, and its rank grows with every round.

    Ours: every client is given the whole change in every round, compressed without loss to at most min(out, in) terms, so
    that one that missed a round is not behind; the paper sends the round's stack to all. The paper's known weakness stays:
    adapters start from nothing in every round.
    """
    if not sum_.weight:
        return state
    return State(state.live, state.frozen.plus(sum_.mean()).compress())
