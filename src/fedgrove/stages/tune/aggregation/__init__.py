"""Aggregation for tuning: combines the clients' changes of one linear. A new aggregation is a new file here.

A file holds both the client's and the server's half of a method; its name is the stage's ``aggregation``. The change of a
weight is always ``state.total()``: the frozen part plus the part that clients continue to train. Every client computes with all
of it (its start and the rest), whatever its rank, so that all clients train the same model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from torch import Tensor

from fedgrove import plugins
from fedgrove.stages.tune.changes import Start, State
from fedgrove.stages.tune.factors import Factors

PACKAGE = "stages.tune.aggregation"
# Of a change: two factors, tensors that can be averaged directly, or coefficients of directions that all know.
Form = Literal["factors", "tensors", "coefficients"]


@dataclass(frozen=True)
class Options:
    """The keys of a stage's table that :meth:`Aggregation.finish` reads.

    Attributes:
        rank: the largest rank of the server's adapter.
        partition: average each band of ranks over the clients that have it.
    """

    rank: int
    partition: bool = True


@dataclass(frozen=True)
class Drawing:
    """From what a client's directions are drawn.

    Attributes:
        seeds: number of directions in the whole stage; 0: new ones in every round.
        steps: number of directions of a client in a round.
        round: index of the round.
        seed: of the stage, with the client's name.
        chances: (seeds,) int64, how likely each direction is drawn; None: all alike.
    """

    seeds: int
    steps: int
    round: int
    seed: str
    chances: Tensor | None = None


class Aggregation(Protocol):
    """What every aggregation's file has; :class:`ChangeAggregation` or :class:`SeedAggregation` is its whole contract.

    Attributes:
        TAKES: the forms of change that it can sum.
        EQUAL_RANKS: whether all clients must have the same ranks.
        SHARED_A: whether all clients share one A, which is neither trained nor sent.
        SERVER_OPTIMIZERS: whether a server optimizer can be applied to its result.
        DEFAULTS: values of the stage's keys that have another default with it.
    """

    TAKES: frozenset[Form]
    EQUAL_RANKS: bool
    SHARED_A: bool
    SERVER_OPTIMIZERS: bool
    DEFAULTS: Mapping[str, Any]


class ChangeAggregation(Aggregation, Protocol):
    """The contract of an aggregation of changes of linears."""

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


class SeedAggregation(Aggregation, Protocol):
    """The contract of an aggregation of steps along random directions: which directions a client goes, and what is summed.

    Attributes:
        BOUNDED: whether it needs a number of directions above 0.
        LOCAL_STEPS: whether a client goes along each direction by its own slope before it tries the next one.
        SAMPLINGS: the values of the key ``sampling`` that it takes, the default first.
    """

    BOUNDED: bool
    LOCAL_STEPS: bool
    SAMPLINGS: tuple[str, ...]

    def draw(self, drawing: Drawing) -> list[int]:
        """The direction of each of a client's steps in a round."""
        ...

    def summed(self, drawing: Drawing) -> list[int]:
        """The direction of each number of a client's response. The same for all clients."""
        ...

    def chances(self, coefficients: Tensor, draws: Tensor, sampling: str) -> Tensor | None:
        """How likely each direction is drawn in the next round, as integers; None: all alike.

        Args:
            coefficients: (directions,) int64, of the model so far.
            draws: (directions,) int64, how often each was drawn by all clients so far.
            sampling: the key of the job.
        """
        ...


METHOD = Aggregation
CONTRACTS: dict[Form, Any] = {
    "factors": ChangeAggregation,
    "tensors": ChangeAggregation,
    "coefficients": SeedAggregation,
}


def aggregation_of(name: str) -> Aggregation:
    """Loads an aggregation by name; it fulfils the contract of every form that it takes."""
    found = cast(Aggregation, plugins.load(PACKAGE, name))
    for form in found.TAKES:
        plugins.load(PACKAGE, name, CONTRACTS[form])
    return found


def change_aggregation_of(name: str) -> ChangeAggregation:
    """Loads an aggregation of changes by name."""
    return cast(ChangeAggregation, plugins.load(PACKAGE, name, ChangeAggregation))


def seed_aggregation_of(name: str) -> SeedAggregation:
    """Loads an aggregation of steps along directions by name."""
    return cast(SeedAggregation, plugins.load(PACKAGE, name, SeedAggregation))


def leading(state: State[Factors], rank: int) -> Start[Factors]:
    """A start with the first ``rank`` terms to train; everything else is frozen."""
    return Start(state.live.part(0, rank), state.frozen.plus(state.live.part(rank, state.live.rank)))
