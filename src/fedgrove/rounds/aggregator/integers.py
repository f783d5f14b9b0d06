"""The simplest accumulator: a sum of integers, with weight 1 for each client."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import CHANGE, Message, Reply, Tensors


class IntegerSums:
    """The sum over clients of the integer tensors ``change/<name>``: the same in the open and under secure aggregation.

    Args:
        check_total: called with the sums by name and the clients' replies; raises WireError if the total is impossible.
            It is not called in the open, where each response is checked.
        bits: of the ring of int64 tensors.
        keep_parts: also keep what each client sent (in the open).

    Attributes:
        sums: by name, without ``change/``.
        parts: by client, what it sent by name, without ``change/``.
    """

    def __init__(
        self,
        check_total: Callable[[Tensors, Mapping[str, Reply]], None] | None = None,
        bits: int = 64,
        keep_parts: bool = False,
    ):
        self.sums: Tensors = {}
        self.parts: dict[str, Tensors] = {}
        self._keep_parts = keep_parts
        self._totals: dict[str, WeightedSum] = {}
        self._check_total = check_total
        self._bits = bits

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """The same messages: they ask for integers already."""
        return dict(messages)

    def ring_bits(self) -> int:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.ring_bits`."""
        return self._bits

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        """Adds one response."""
        if self._keep_parts:
            self.parts[client] = {name.removeprefix(CHANGE): tensor for name, tensor in tensors.items()}
        for name in list(tensors):
            total = self._totals.setdefault(name.removeprefix(CHANGE), WeightedSum())
            total.add(tensors.pop(name), 1.0)
        self.sums = {name: total.value for name, total in self._totals.items() if total.value is not None}

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        """Takes an opened sum; see :meth:`fedgrove.rounds.aggregator.base.Accumulator.add_total`."""
        sums = {name.removeprefix(CHANGE): value for name, value in total.items()}
        if self._check_total is not None:
            self._check_total(sums, replies)
        self.sums = sums
