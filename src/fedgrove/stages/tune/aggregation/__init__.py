"""Aggregation for tuning: combines the clients' changes of one linear. A new aggregation is a new file here.

A file holds both the client's and the server's half of a method; its name is the stage's ``aggregation``. The change of a
weight is always ``state.total()``: the frozen part plus the part that clients continue to train. Every client computes with all
of it (its start and the rest), whatever its rank, so that all clients train the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from fedgrove import plugins
from fedgrove.stages.tune.changes import Start, State
from fedgrove.stages.tune.factors import Factors

PACKAGE = "stages.tune.aggregation"
Form = Literal["factors", "tensors"]  # of a change: two factors, or tensors that can be averaged directly


@dataclass(frozen=True)
class Options:
    """The keys of a stage's table that :meth:`Aggregation.finish` reads.

    Attributes:
        rank: the largest rank of the server's adapter.
        partition: average each band of ranks over the clients that have it.
    """

    rank: int
    partition: bool = True


class Aggregation(Protocol):
    """The contract of an aggregation's file.

    Attributes:
        TAKES: the forms of change that it can sum.
        EQUAL_RANKS: whether all clients must have the same ranks.
        SHARED_A: whether all clients share one A, which is neither trained nor sent.
        SERVER_OPTIMIZERS: whether a server optimizer can be applied to its result.
    """

    TAKES: frozenset[Form]
    EQUAL_RANKS: bool
    SHARED_A: bool
    SERVER_OPTIMIZERS: bool

    def begin(self, state: State[Any], rank: int) -> Start[Any]:
        """The start of a client that tunes this linear at ``rank``; 0: it does not tune it."""
        ...

    def sums(self, state: State[Any], ranks: Sequence[int]) -> Any:
        """An empty sum, given the planned ranks of this round's clients."""
        ...

    def add(self, sums: Any, change: Any, weight: float) -> None:
        """Adds one client: its trained change, scales multiplied in, weighted by its number of tokens."""
        ...

    def finish(self, state: State[Any], sums: Any, options: Options) -> State[Any]:
        """The new state of the linear."""
        ...


METHOD = Aggregation


def aggregation_of(name: str) -> Aggregation:
    """Loads an aggregation by name."""
    return cast(Aggregation, plugins.load(PACKAGE, name))


def leading(state: State[Factors], rank: int) -> Start[Factors]:
    """A start with the first ``rank`` terms to train; everything else is frozen."""
    return Start(state.live.part(0, rank), state.frozen.plus(state.live.part(rank, state.live.rank)))
