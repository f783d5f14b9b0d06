"""FLoRA (arXiv 2409.05976): new adapters on the merged base in every round; stacking them gives the exact mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedgrove.stages.tune.aggregation import Form, Options
from fedgrove.stages.tune.changes import Start, State
from fedgrove.stages.tune.factors import Factors, ProductSum

TAKES: frozenset[Form] = frozenset({"factors"})
EQUAL_RANKS = False
SHARED_A = False
SERVER_OPTIMIZERS = False
DEFAULTS: Mapping[str, Any] = {}


def begin(state: State[Factors], rank: int) -> Start[Factors]:
    """A new adapter on top of everything learned so far."""
    return Start(state.live.part(0, 0), state.total())


def sums(state: State[Factors], ranks: Sequence[int]) -> ProductSum:
    """One sum of products."""
    return ProductSum(state.live.b.shape[0], state.live.a.shape[1])


def add(sum_: ProductSum, factors: Factors, weight: float) -> None:
    """Adds a client's product."""
    sum_.add(factors, weight)


def finish(state: State[Factors], sum_: ProductSum, options: Options) -> State[Factors]:
    """Adds the mean of the products to the frozen part: exact at any ranks, but the rank grows in every round.

    Ours: in every round each client gets the complete change, compressed without loss to at most min(out, in) terms, so that a
    client that missed a round is up to date; the paper sends the stacked adapters of the round. The paper's known weakness
    remains: adapters start from zero in every round.
    """
    if not sum_.weight:
        return state
    return State(state.live, state.frozen.plus(sum_.mean()).compress())
