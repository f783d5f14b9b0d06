"""Several sums in one exchange: each client's response goes to one of them."""

from __future__ import annotations

from collections.abc import Mapping

from fedgrove.errors import FedgroveError
from fedgrove.rounds.aggregator.base import Accumulator
from fedgrove.rounds.request import Message, Reply, Tensors


class Apart:
    """Gives each client's response to the accumulator that the client belongs to. Only in the open.

    Args:
        into: by client.
    """

    def __init__(self, into: Mapping[str, Accumulator]):
        self._into = into

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Always raises FedgroveError: the total of all clients is known, and none of its parts."""
        raise FedgroveError("privacy.secure_aggregation: a secure sum has no parts", "leave secure_aggregation out")

    def ring_bits(self) -> int:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.ring_bits`."""
        return 64

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        """Adds a response to its client's accumulator."""
        self._into[client].add(client, tensors, reply)

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        """Not possible: see :meth:`masked`."""
        raise NotImplementedError
