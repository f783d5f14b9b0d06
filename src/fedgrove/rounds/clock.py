"""What messages and work would take on the clients' own machines, where one machine stands for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Pace:
    """A client's, by its card.

    Attributes:
        compute: seconds until it has an answer.
        uplink, downlink: bits a second; None: sending takes no time.
    """

    compute: float = 0.0
    uplink: int | None = None
    downlink: int | None = None


@dataclass
class Clock:
    """The modelled seconds of one exchange: clients work side by side, so it takes as long as the slowest of them.

    Attributes:
        paces: of every client that is asked.
        spent: seconds so far, by client.
    """

    paces: Mapping[str, Pace]
    spent: dict[str, float] = field(default_factory=dict)

    def spend(self, client: str, direction: Literal["up", "down"], num_bytes: int) -> dict[str, float]:
        """A message on its way: its seconds of ``transfer``, and of ``compute`` before an answer goes up."""
        pace = self.paces[client]
        rate = pace.uplink if direction == "up" else pace.downlink
        took = {"transfer": 8 * num_bytes / rate if rate else 0.0}
        if direction == "up":
            took = {"compute": pace.compute, **took}
        self.spent[client] = self.spent.get(client, 0.0) + sum(took.values())
        return took

    def slowest(self, clients: Iterable[str]) -> float:
        """The most that one of these clients took."""
        return max((self.spent.get(client, 0.0) for client in clients), default=0.0)
