"""Aggregation for pruning: what clients send, and what the server computes from it. A new aggregation is a new file here.

``SOLVED_AT`` distinguishes two kinds:

**"client"**: each client prunes a block on its own text. The file holds the client's half and the server's, for one matrix:

    weigh(before, after, mask, tokens) -> (change, weight)     on the client: what is added to the sum
    finish(before, sums, target, options) -> (weight, mask)    on the server: the result from the sum

``before`` is the weight at the start of the round, ``after`` and ``mask`` (True = kept) are the pruner's result, ``tokens`` is
the number of calibration tokens, ``sums`` is the :class:`~fedgrove.rounds.aggregator.weighted_sum.WeightedSum` of this matrix.
``change`` is a tensor, or None if only the weight is sent; ``weight`` is a bool mask or one number. Matrices are (out, in).

**"server"**: clients send sums over their text, and the server prunes with the totals; see
:mod:`fedgrove.stages.prune.aggregation.pooled`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, cast

from torch import Tensor

from fedgrove import plugins
from fedgrove.models.masks import Target
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import Disclosure

PACKAGE = "stages.prune.aggregation"


@dataclass(frozen=True)
class Options:
    """The keys of a stage's table that :meth:`ClientSolved.finish` reads."""

    shrink: float = 0.0
    expand: bool = True


class Aggregation(Protocol):
    """The attributes of an aggregation's file.

    Attributes:
        SENDS: what a client's responses disclose of its text.
        SOLVED_AT: where matrices are pruned.
        READS: which of the keys that only some aggregations use this one uses.
        SECURE: whether secure aggregation can sum what clients send: masks and integers yes, weighted averages no.
        SOURCE, DAMPING: the defaults of the keys ``source`` and ``damping``.
    """

    SENDS: frozenset[Disclosure]
    SOLVED_AT: Literal["client", "server"]
    READS: frozenset[str]
    SECURE: bool
    SOURCE: Literal["dense", "sequential"]
    DAMPING: Literal["mean", "each"]


class ClientSolved(Aggregation, Protocol):
    """The contract of an aggregation with ``SOLVED_AT = "client"``."""

    def weigh(self, before: Tensor, after: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor | None, Tensor | float]:
        """On the client; see the module's docstring."""
        ...

    def finish(self, before: Tensor, sums: WeightedSum, target: Target, options: Options) -> tuple[Tensor, Tensor]:
        """On the server; see the module's docstring."""
        ...


METHOD = Aggregation


def aggregation_names() -> list[str]:
    """The names of all aggregations."""
    return plugins.names(PACKAGE)


def aggregation_of(name: str) -> Aggregation:
    """Loads an aggregation by name."""
    return cast(Aggregation, plugins.load(PACKAGE, name))


def client_solved(name: str) -> ClientSolved:
    """Loads an aggregation whose matrices are pruned at the client."""
    return cast(ClientSolved, plugins.load(PACKAGE, name, ClientSolved))
