"""How a sum over clients is computed: in the open or securely. A stage does not know which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from fedgrove.models.blocks import Decoder
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.request import Message, Reply, Request, Tensors

R = TypeVar("R", bound=Request)


class Accumulator(Protocol):
    """The server's half of an exchange whose responses are summed.

    Its requests are either added one by one (in the open) or opened as a total of integers (securely). Both come to the same
    sums: that is what an exchange has to see to.
    """

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """The requests by which clients send integers that a ring can hold, for sums under secure aggregation."""
        ...

    def ring_bits(self) -> int:
        """Bits of the ring of int64 tensors; no sum may be as large as 2 to the bits − 1."""
        ...

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        """Adds one response that was checked. Tensors may be taken out of the dict, so that memory goes as soon as it can."""
        ...

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        """Takes the sum of the integers of these clients.

        Raises:
            WireError: the sum cannot be one of clients that did as they were asked.
        """
        ...


class Aggregator(Protocol):
    """Computes sums over clients."""

    def aggregate(
        self,
        messages: Mapping[str, Message],
        into: Accumulator,
        *,
        layout: Decoder | None = None,
        clock: Clock | None = None,
    ) -> dict[str, Reply]:
        """Asks the clients and adds up what they send.

        Args:
            messages: by client.
            into: what is added to.
            layout: the model at the server, see :meth:`fedgrove.rounds.request.Request.expected`.
            clock: what the messages would take on the clients' own machines.

        Returns:
            The replies of the clients that are in the sums, in the order of their names.

        Raises:
            FedgroveError: too few answered (``rounds.quorum``), or the sum cannot be one.
        """
        ...
