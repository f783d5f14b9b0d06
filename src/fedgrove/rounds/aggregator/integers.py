"""The plainest accumulator: integers, each client's with weight one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import CHANGE, Message, Reply, Tensors


class IntegerSums:
    """Σ of what clients send as ``change/<name>``, integers: the same bits in the open and securely.

    Args:
        check_total: refuses a total that cannot be one; given the sums by name and the clients' replies. Sums in the open were
            checked response by response.
        bits: of the ring of int64 tensors.

    Attributes:
        sums: by name, without ``change/``.
    """

    def __init__(self, check_total: Callable[[Tensors, Mapping[str, Reply]], None] | None = None, bits: int = 64):
        self.sums: Tensors = {}
        self._totals: dict[str, WeightedSum] = {}
        self._check_total = check_total
        self._bits = bits

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """They are integers already."""
        return dict(messages)

    def ring_bits(self) -> int:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.ring_bits`."""
        return self._bits

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        """Adds one response."""
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
