"""The public description of one secure sum: the clients, their neighbors, and how many must not drop out."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Annotated, NamedTuple

from pydantic import Field

from fedgrove.errors import FedgroveError
from fedgrove.job.units import MAX_CLIENTS, Name


class SecureError(FedgroveError):
    """A client refuses a message, or a sum cannot be opened."""


class OtherSurvivors(SecureError):
    """A client's response to a request is already in a sum of other clients: the difference could reveal one of them."""


class Parameters(NamedTuple):
    """How many of a sum's clients share masks, and how many must not drop out.

    Attributes:
        degree: the number of neighbors of each client: even, or all other clients.
        threshold: how many of the ``degree`` + 1 shares of a secret recover it, and how many of a client and its
            neighbors must have signed the list of survivors before the client reveals shares.
        quorum: the smallest number of survivors with which the sum is opened.
    """

    degree: int
    threshold: int
    quorum: int


def parameters(clients: int) -> Parameters:
    """The parameters of a sum; the server and every client compute them, so no message contains them.

    With up to 49 clients, all are neighbors of each other, and two thirds of them (rounded up) have to survive. With
    more clients, each has 8·⌈log₂ n⌉ neighbors; two thirds of all clients and about half of each neighborhood have to
    survive. Neighborhoods are random, so some lose more than a third of their members when a third of all clients drops
    out.

    Args:
        clients: how many are asked to take part.

    Raises:
        SecureError: fewer than two clients.
    """
    if clients < 2:
        raise SecureError("secure aggregation: a sum of one client is not secret; there must be at least two")
    quorum = min_survivors(clients)
    degree = 8 * math.ceil(math.log2(clients))
    if degree >= clients - 1:
        return Parameters(clients - 1, quorum, quorum)
    return Parameters(degree, degree // 2 + 2, quorum)


def min_survivors(clients: int) -> int:
    """The smallest number of survivors of ``clients`` in any opened sum: two thirds (rounded up), more than half."""
    return max(clients - clients // 3, clients // 2 + 1)


@dataclass(frozen=True)
class Session:
    """The public description of one sum. Every client signs it together with its keys.

    The bounds of the fields hold for a session that comes from the network; no other one can exceed them.

    Attributes:
        name: random, new for every sum.
        clients: names of the clients that are asked to take part, sorted. Their number determines ``degree``,
            ``threshold`` and ``quorum``: see :class:`Parameters`.
        bits: the size of the ring of int64 tensors, 8 to 64.
        request: a hash of what all clients are asked alike, see :meth:`fedgrove.rounds.request.Request.sum_digest`. As
            part of the session it is in every signature and in the derivation of every mask.

    Raises:
        SecureError: the clients are too few, not sorted or not distinct, or there is no such ring.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,64}$")]
    clients: Annotated[tuple[Name, ...], Field(max_length=MAX_CLIENTS)]
    bits: Annotated[int, Field(ge=8, le=64, strict=True)] = 64
    request: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""

    def __post_init__(self) -> None:
        if sorted(set(self.clients)) != list(self.clients):
            raise SecureError("secure aggregation: the clients are not sorted, or one is named twice")
        if type(self.bits) is not int or not 8 <= self.bits <= 64:
            raise SecureError("secure aggregation: a ring must have 8 to 64 bits")
        parameters(len(self.clients))

    @property
    def degree(self) -> int:
        """See :class:`Parameters`."""
        return parameters(len(self.clients)).degree

    @property
    def threshold(self) -> int:
        """See :class:`Parameters`."""
        return parameters(len(self.clients)).threshold

    @property
    def quorum(self) -> int:
        """See :class:`Parameters`."""
        return parameters(len(self.clients)).quorum

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all fields, 32 bytes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def ring_bits(self, itemsize: int) -> int:
        """The size in bits of the ring in which numbers of ``itemsize`` bytes are summed."""
        return {1: len(self.clients).bit_length(), 4: 32, 8: self.bits}[itemsize]

    def neighbors(self, client: str) -> list[str]:
        """The clients that share pairwise masks with a client, sorted.

        They are ``degree`` / 2 on each side of it on a ring of all clients, whose order the session's name decides.
        """
        if self.degree >= len(self.clients) - 1:
            return [other for other in self.clients if other != client]
        ring = _ring(self)
        at, half = ring.index(client), self.degree // 2
        return sorted(ring[(at + step) % len(ring)] for step in range(-half, half + 1) if step)

    def holders(self, client: str) -> list[str]:
        """The clients that hold shares of a client's secrets, sorted: its neighbors and itself."""
        return sorted([*self.neighbors(client), client])


@lru_cache(maxsize=8)
def _ring(session: Session) -> list[str]:
    return sorted(session.clients, key=lambda client: hashlib.sha256(f"{session.name}/{client}".encode()).digest())


def new_session(clients: Iterable[str], bits: int = 64, request: str = "") -> Session:
    """The next sum, with a random name.

    Args:
        clients: their names.
        bits: size of the ring of int64 tensors.
        request: see :class:`Session`.

    Raises:
        SecureError: fewer than two clients.
    """
    return Session(secrets.token_hex(16), tuple(sorted(clients)), bits, request)
