"""How requests reach clients. Only engines deal with processes and networks.

An engine transports opaque bytes and the name of their request type. Responses come in any order, and every failure is
reported as an error of its client. An engine must not rely on anything that a client remembers between requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol


class Engine(Protocol):
    """The interface that rounds require of an engine."""

    def clients(self) -> list[str]:
        """The clients that can get requests, sorted by name."""
        ...

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        """Sends each client its message; yields (client, response, error) in any order, exactly once per client.

        Either the response or the error is None.

        Args:
            kind: a request's name on the wire, see :mod:`fedgrove.rounds.request`.
            messages: for each client the bytes of :func:`fedgrove.rounds.wire.pack`. A message is packed when it is
                looked up, so look up each one exactly once, when it is sent.
            timeout: seconds until a client that has not responded counts as failed; None: the engine's default.
            largest: bytes of the largest response that can be valid. A larger one is an error, and an engine refuses it
                as early as it can, see :func:`too_large`; None: no limit.
        """
        ...


def too_large(largest: int) -> str:
    """The error of a client whose response is larger than any valid one."""
    return f"its response was refused: it has more than the {largest:,} bytes that were expected at most"
