"""How requests reach clients: the only place that knows of processes and networks.

An engine moves named, opaque bytes. It promises no order, gives every failure as an answer, and may rely on nothing that a
site remembers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol


class Engine(Protocol):
    """What the rounds need of an engine."""

    def clients(self) -> list[str]:
        """The clients that can be asked, sorted by name."""
        ...

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        """Sends each client its message and yields (client, response, error) as they come; exactly one each.

        Args:
            kind: a request's name on the wire, see :mod:`fedgrove.rounds.request`.
            messages: for each client the bytes of :func:`fedgrove.rounds.wire.pack`. They are packed when they are taken:
                take each one once, when it is sent.
            timeout: seconds until a client that has not answered counts as failed; None waits.
        """
        ...
