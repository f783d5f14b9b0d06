"""Sums that the server computes itself: it sees each response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedgrove.engines.base import Engine
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.aggregator.base import Accumulator
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.collect import collect
from fedgrove.rounds.request import Message, Reply
from fedgrove.runfolder import RunFolder


@dataclass(frozen=True)
class OpenAggregator:
    """Adds one response after the other, in the order of the clients' names, whichever comes first: the bits are the
    same."""

    engine: Engine
    run: RunFolder

    def aggregate(
        self,
        messages: Mapping[str, Message],
        into: Accumulator,
        *,
        layout: Decoder | None = None,
        clock: Clock | None = None,
    ) -> dict[str, Reply]:
        """See :meth:`fedgrove.rounds.aggregator.base.Aggregator.aggregate`."""
        replies: dict[str, Reply] = {}
        for client, tensors, reply in collect(self.engine, self.run, messages, layout=layout, clock=clock):
            into.add(client, tensors, reply)
            replies[client] = reply
        return replies
