"""Rules for adapters of one linear: what a client starts from, and what the server makes of what came back.

Both halves of one published idea live in one file; its name is the stage's ``aggregation``. An aggregation holds

    TRAINS                              "ab" or "b": the factors that clients train and send
    begin(state, rank) -> Start         what a client that tunes this linear at ``rank`` (0: not) begins with
    sums(state, ranks) -> S             an empty sum; ``ranks`` are the planned ranks of this round's clients
    add(sum, factors, weight)           one client: its B and A as trained, scales folded in, and its number of tokens
    finish(state, sum, options) -> State

The change of the weight is always ``state.total()``: what is frozen for the clients and what they go on training. A client
computes with all of it (its start and the rest), whatever its own rank: so no client trains against a model that nobody
has.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedgrove.stages.tune.factors import Factors


@dataclass(frozen=True)
class Options:
    """What a job may say to an aggregation (see ``[[stages]]`` of kind "tune").

    Attributes:
        rank: the largest rank of the adapter that the server keeps.
        partition: weigh each band of ranks over those who have it.
    """

    rank: int
    partition: bool = True


@dataclass(frozen=True)
class State:
    """A linear's adapter on the server, in float64.

    Attributes:
        live: what clients train on: its first terms, as many as their rank.
        frozen: what has become part of the base.
    """

    live: Factors
    frozen: Factors

    def total(self) -> Factors:
        """The change of the weight, as factors."""
        return self.frozen.plus(self.live)


@dataclass(frozen=True)
class Start:
    """What a client begins with.

    Attributes:
        own: what it trains; its rank may be less than planned, then fresh terms (B = 0) fill it up.
        rest: the remainder of the change, which it computes with and does not touch.
    """

    own: Factors
    rest: Factors


def leading(state: State, rank: int) -> Start:
    """The first ``rank`` terms to train, everything else to hold."""
    return Start(state.live.part(0, rank), state.frozen.plus(state.live.part(rank, state.live.rank)))
