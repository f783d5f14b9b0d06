"""What clients send in a stage that prunes, and what the server makes of it. A new aggregation is a new file here.

There are two kinds, told apart by ``SOLVED_AT``:

**At the client.** Each client prunes a block on its own text; both halves of one federated idea stand in one file, matrix by
matrix:

    weigh(before, after, mask, tokens) -> (change, weight)     on the client: what is put into the sum
    finish(before, sums, target, options) -> (weight, mask)    on the server: what is made of the sum

``before`` is the weight as the round began, ``after`` and ``mask`` what the pruner made of it (True = kept), ``tokens`` the
number
of calibration tokens, ``sums`` the :class:`~fedgrove.rounds.aggregator.weighted_sum.WeightedSum` of this matrix. ``change`` is
a tensor, or None (only the weight is sent); ``weight`` is a bool mask or one number. Matrices lie as the linear multiplies:
(out, in).

**At the server.** Clients send sums over their text, and the server prunes with the totals: see
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
    """What an aggregation's file says of itself.

    Attributes:
        SENDS: what a client's responses tell of its text.
        SOLVED_AT: where matrices are pruned.
        READS: the keys of the stage's table that only some aggregations look at, of those that this one does.
        SECURE: whether what clients send can be summed unseen: masks and whole numbers can, weighted averages cannot.
        SOURCE, DAMPING: the defaults of the keys ``source`` and ``damping``.
    """

    SENDS: frozenset[Disclosure]
    SOLVED_AT: Literal["client", "server"]
    READS: frozenset[str]
    SECURE: bool
    SOURCE: Literal["dense", "sequential"]
    DAMPING: Literal["mean", "each"]


class ClientSolved(Aggregation, Protocol):
    """Likewise, of one that is solved at the client."""

    def weigh(self, before: Tensor, after: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor | None, Tensor | float]:
        """See above."""
        ...

    def finish(self, before: Tensor, sums: WeightedSum, target: Target, options: Options) -> tuple[Tensor, Tensor]:
        """See above."""
        ...


METHOD = Aggregation


def aggregation_names() -> list[str]:
    """All of them."""
    return plugins.names(PACKAGE)


def aggregation_of(name: str) -> Aggregation:
    """The aggregation of that name."""
    return cast(Aggregation, plugins.load(PACKAGE, name))


def client_solved(name: str) -> ClientSolved:
    """Likewise, of one whose matrices are pruned at the client."""
    return cast(ClientSolved, plugins.load(PACKAGE, name, ClientSolved))
