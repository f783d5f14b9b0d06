"""What the server makes of the clients' changes of one linear: a new aggregation is a new file here.

Both halves of one published idea stand in one file; its name is the stage's ``aggregation``. The change of the weight is always
``state.total()``: what is frozen for the clients and what they go on training. A client computes with all of it (its start and
the rest), whatever its own rank: so no client trains against a model that nobody has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from fedgrove import plugins
from fedgrove.stages.tune.changes import Start, State
from fedgrove.stages.tune.factors import Factors

PACKAGE = "stages.tune.aggregation"
Form = Literal["factors", "tensors"]  # of a change: two factors, or tensors that can be averaged as they are


@dataclass(frozen=True)
class Options:
    """The keys of a stage's table that :meth:`Aggregation.finish` reads.

    Attributes:
        rank: the largest rank of the adapter that the server keeps.
        partition: weigh each band of ranks over those who have it.
    """

    rank: int
    partition: bool = True


class Aggregation(Protocol):
    """What an aggregation's file holds.

    Attributes:
        TAKES: the forms of change that it can sum.
        EQUAL_RANKS: whether all clients must have the same ranks.
        SHARED_A: whether all clients share one A, which is neither trained nor sent.
        SERVER_OPTIMIZERS: whether what it makes of a round can be smoothed over rounds.
    """

    TAKES: frozenset[Form]
    EQUAL_RANKS: bool
    SHARED_A: bool
    SERVER_OPTIMIZERS: bool

    def begin(self, state: State[Any], rank: int) -> Start[Any]:
        """What a client that tunes this linear at ``rank`` (0: not) begins with."""
        ...

    def sums(self, state: State[Any], ranks: Sequence[int]) -> Any:
        """An empty sum; ``ranks`` are the planned ranks of this round's clients."""
        ...

    def add(self, sums: Any, change: Any, weight: float) -> None:
        """Adds one client: its change as trained, scales folded in, and its number of tokens."""
        ...

    def finish(self, state: State[Any], sums: Any, options: Options) -> State[Any]:
        """The new state of the linear."""
        ...


METHOD = Aggregation


def aggregation_of(name: str) -> Aggregation:
    """The aggregation of that name."""
    return cast(Aggregation, plugins.load(PACKAGE, name))


def leading(state: State[Factors], rank: int) -> Start[Factors]:
    """The first ``rank`` terms to train, everything else to hold."""
    return Start(state.live.part(0, rank), state.frozen.plus(state.live.part(rank, state.live.rank)))
