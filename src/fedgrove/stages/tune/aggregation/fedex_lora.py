"""FedEx-LoRA (arXiv 2410.09432): average A and B, and put what that misses into the frozen base."""

from __future__ import annotations

from collections.abc import Sequence

from fedgrove.errors import FedgroveError
from fedgrove.stages.tune.aggregation import Options, Start, State, fedit as mean
from fedgrove.stages.tune.aggregation import leading as begin
from fedgrove.stages.tune.factors import Factors, ProductSum

TRAINS = "ab"

__all__ = ["TRAINS", "Start", "add", "begin", "finish", "sums"]

Sum = tuple[mean.Pair, ProductSum]


def sums(state: State, ranks: Sequence[int]) -> Sum:
    """The sums of the factors and of their products.

    Raises:
        FedgroveError: the clients' ranks differ; the method is not defined for that.
    """
    if len(set(ranks)) > 1:
        raise FedgroveError('aggregation "fedex_lora" needs equal ranks: use method = "lora", or aggregation = "flexlora"')
    return mean.sums(state, ranks), ProductSum(state.live.b.shape[0], state.live.a.shape[1])


def add(sum_: Sum, factors: Factors, weight: float) -> None:
    """Adds a client to both."""
    mean.add(sum_[0], factors, weight)
    sum_[1].add(factors, weight)


def finish(state: State, sum_: Sum, options: Options) -> State:
    """Mean(B), mean(A), and the residual mean(B·A) − mean(B)·mean(A) frozen: together the exact mean, and A and B stay warm.

    The residual's rank is at most (clients − 1)·rank; it is kept as factors, without loss.
    """
    if not sum_[1].weight:
        return state
    live = mean.finish(State(Factors.none(state.live.b.shape[0], state.live.a.shape[1]), state.frozen), sum_[0], options).live
    residual = sum_[1].mean().plus(live.scaled(-1.0))
    return State(live, state.frozen.plus(residual).compress())
