"""FedEx-LoRA (arXiv 2410.09432): averages A and B, and adds the error of doing so to the frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedgrove.errors import FedgroveError
from fedgrove.stages.tune.aggregation import Form, Options, fedit
from fedgrove.stages.tune.aggregation import leading as begin
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.factors import Factors, ProductSum

TAKES: frozenset[Form] = frozenset({"factors"})
EQUAL_RANKS = True
SHARED_A = False
SERVER_OPTIMIZERS = False
DEFAULTS: Mapping[str, Any] = {}

__all__ = ["EQUAL_RANKS", "SERVER_OPTIMIZERS", "SHARED_A", "TAKES", "add", "begin", "finish", "sums"]

Sum = tuple[fedit.Pair, ProductSum]


def sums(state: State[Factors], ranks: Sequence[int]) -> Sum:
    """The sums of the factors and of their products.

    Raises:
        FedgroveError: the clients' ranks differ, for which the method is not defined.
    """
    if len(set(ranks)) > 1:
        raise FedgroveError('aggregation "fedex_lora" needs equal ranks: use method = "lora", or aggregation = "flexlora"')
    return fedit.sums(state, ranks), ProductSum(state.live.b.shape[0], state.live.a.shape[1])


def add(sum_: Sum, factors: Factors, weight: float) -> None:
    """Adds a client to both sums."""
    fedit.add(sum_[0], factors, weight)
    sum_[1].add(factors, weight)


def finish(state: State[Factors], sum_: Sum, options: Options) -> State[Factors]:
    """Mean(B) and mean(A), with the residual mean(B·A) − mean(B)·mean(A) frozen: together exactly the mean of the products.

    Clients continue to train the means of A and B. The rank of the residual is at most (clients − 1)·rank; it is stored as
    factors, without loss.
    """
    if not sum_[1].weight:
        return state
    live = fedit.finish(State(Factors.none(state.live.b.shape[0], state.live.a.shape[1]), state.frozen), sum_[0], options).live
    residual = sum_[1].mean().plus(live.scaled(-1.0))
    return State(live, state.frozen.plus(residual).compress())
