"""A model of the time that computation and messages would take on the clients' machines, when one machine simulates all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Pace:
    """How fast a client is, from its capabilities.

    Attributes:
        compute: seconds until its response is ready.
        uplink, downlink: bits per second; None: transfers take no time.
    """

    compute: float = 0.0
    uplink: int | None = None
    downlink: int | None = None


@dataclass
class Clock:
    """The modelled seconds of one exchange. Clients work in parallel, so it takes as long as the slowest of them.

    Attributes:
        paces: by client, for all clients that get a request.
        spent: seconds so far, by client.
        elapsed: not modelled: seconds of this machine's clock from a client's latest message to its response.
    """

    paces: Mapping[str, Pace]
    spent: dict[str, float] = field(default_factory=dict)
    elapsed: dict[str, float] = field(default_factory=dict)
    _sent: dict[str, float] = field(default_factory=dict)

    def spend(self, client: str, direction: Literal["up", "down"], num_bytes: int) -> dict[str, float]:
        """Adds the time of one message.

        Returns:
            Its seconds of ``transfer``, and for direction "up" also the seconds of ``compute`` before it is sent.
        """
        pace, now = self.paces[client], time.monotonic()
        if direction == "down":
            self._sent[client] = now
        else:
            self.elapsed[client] = now - self._sent.get(client, now)
        rate = pace.uplink if direction == "up" else pace.downlink
        seconds = {"transfer": 8 * num_bytes / rate if rate else 0.0}
        if direction == "up":
            seconds = {"compute": pace.compute, **seconds}
        self.spent[client] = self.spent.get(client, 0.0) + sum(seconds.values())
        return seconds

    def slowest(self, clients: Iterable[str]) -> float:
        """The seconds of the slowest of these clients."""
        return max((self.spent.get(client, 0.0) for client in clients), default=0.0)
