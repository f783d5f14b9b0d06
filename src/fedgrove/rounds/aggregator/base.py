"""How a sum over clients is computed: in the open or under secure aggregation. Stages do not depend on which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from fedgrove.models.blocks import Decoder
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.request import Message, Reply, Request, Tensors

R = TypeVar("R", bound=Request)


class Accumulator(Protocol):
    """The server's half of an exchange whose responses are summed.

    Responses are either added one by one (in the open), or only their total, in integers, is known (secure
    aggregation). An exchange must ensure that both give the same sums.
    """

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """The messages to send under secure aggregation: their requests ask for integers that fit the ring."""
        ...

    def ring_bits(self) -> int:
        """The bits of the ring of int64 tensors: every |sum| must be smaller than 2^(bits − 1)."""
        ...

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        """Adds one checked response. It may remove tensors from the dict, to free their memory early."""
        ...

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        """Takes the opened total of the integers of these clients.

        Raises:
            WireError: the total is impossible, so some client sent invalid values.
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
        """Sends the messages and adds up the responses.

        Args:
            messages: by client; all requests are of one type.
            into: the accumulator that responses are added to.
            layout: the model at the server, see :meth:`fedgrove.rounds.request.Request.expected`.
            clock: models the time of messages on the clients' own machines.

        Returns:
            The replies of the clients that are in the sums, in the order of their names.

        Raises:
            FedgroveError: too few clients responded (``rounds.quorum``), or the sum is impossible.
        """
        ...
