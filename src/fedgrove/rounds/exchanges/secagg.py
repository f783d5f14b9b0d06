"""The five phases around a sum under secure aggregation: keys, shares, receipt, survivors, opening.

See :mod:`fedgrove.privacy.secagg`. None of them discloses anything about a client's text. Between ``received`` and
``check`` the request for the sum itself is sent, together with a :class:`Masking`, by which the client masks its
response.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import MAX_CLIENTS, Name
from fedgrove.privacy.secagg import client as protocol
from fedgrove.privacy.secagg import keys
from fedgrove.privacy.secagg.keys import TAG_BYTES, Credentials, Key, Signature, hex_of
from fedgrove.privacy.secagg.session import Session
from fedgrove.privacy.secagg.sharing import SHARE_BYTES, Secret
from fedgrove.privacy.secagg.store import SessionStore
from fedgrove.rounds.request import Part, Reply, Request, Response, Tensors
from fedgrove.rounds.wire import WireError


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError("a client is named twice")
    return names


Share = Annotated[str, hex_of(SHARE_BYTES)]
SealedShares = Annotated[str, hex_of(2 * SHARE_BYTES + TAG_BYTES)]
ByClient = Field(max_length=MAX_CLIENTS)
Clients = Annotated[list[Name], Field(max_length=MAX_CLIENTS), AfterValidator(_distinct)]


class Advert(Reply):
    """The public halves of a client's keys for one sum, signed with its long-term key; see :class:`~keys.Advert`."""

    mask_key: Key
    channel_key: Key
    commitment: Key
    signature: Signature


class Ciphertexts(Reply):
    """For each neighbor the shares of this client's secrets, encrypted so that only the neighbor can read them."""

    sealed_shares: Annotated[dict[Name, SealedShares], ByClient]


class Unreadable(Reply):
    """The neighbors whose shares this client could not decrypt."""

    unreadable: Clients


class Signed(Reply):
    """A client's signature of the list of survivors: the clients whose responses are in the sum."""

    signature: Signature


class Revealed(Reply):
    """One share for each owner: of the self-mask of a survivor, or of the mask key of a client that dropped."""

    shares: Annotated[dict[Name, Annotated[dict[Secret, Share], Field(min_length=1, max_length=1)]], ByClient]


class Masking(Part):
    """What a client needs to mask its response: the session, and the neighbors that mask theirs, too."""

    session: Session
    peers: Clients

    @model_validator(mode="after")
    def _known(self) -> Self:
        _check_known(self.session, self.peers)
        return self

    def check(self, client: LocalClient, request: Request, tensors: Tensors) -> None:
        """Checks before the work begins that the response will be summed with those of others to the same request.

        Raises:
            FedgroveError: responses to such a request are not summed, or the session is for another request.
        """
        if request.OWN_FIELDS is None:
            raise client.error(f"responses to '{request.KIND}' are not summed, so no mask would protect them; refused")
        if request.sum_digest(tensors) != self.session.request:
            raise client.error(f"this '{request.KIND}' is not the request that the clients of this sum agreed on; refused")

    def apply(self, client: LocalClient, sum_name: str, tensors: Mapping[str, Tensor]) -> Tensors:
        """The masked tensors of a response. Without the keys they cannot be told from random ones.

        Args:
            sum_name: of the request, see :attr:`~fedgrove.rounds.request.Request.sum_name`.

        Raises:
            FedgroveError: there are none, or the protocol refuses it.
        """
        if not tensors:
            raise client.error("its response has no tensors, so nothing of it would be summed; refused")
        _credentials_of(client)
        return protocol.mask(self.session, client.name, _store_of(client), self.peers, tensors, sum_name)


class _Phase(Request):
    session: Session

    @model_validator(mode="after")
    def _known(self) -> Self:
        _check_known(self.session, self._named())
        return self

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return range(config.highest_round() + 1)

    def beyond(self, job: Agreed) -> str | None:
        return "session" if not job.secure or not set(self.session.clients) <= set(job.clients) else None

    def _named(self) -> Collection[str]:
        """All clients that the fields of this phase name."""
        return ()

    def _own(self, client: LocalClient) -> tuple[Session, str, Credentials, SessionStore]:
        return self.session, client.name, _credentials_of(client), _store_of(client)


class Keys(_Phase):
    """Make two key pairs, and advertise their public halves."""

    KIND: ClassVar[str] = "rounds/secagg/keys"
    REPLY: ClassVar[type[Reply]] = Advert

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        return Response({}, Advert(**vars(protocol.advertise(*self._own(client)))))


class Shares(_Phase):
    """Check the neighbors' keys, and give each a share of this client's two secrets."""

    KIND: ClassVar[str] = "rounds/secagg/shares"
    REPLY: ClassVar[type[Reply]] = Ciphertexts

    adverts: Annotated[dict[Name, keys.Advert], ByClient]
    hashes: Annotated[dict[Name, Key], ByClient]

    def _named(self) -> Collection[str]:
        return self.adverts.keys() | self.hashes.keys()

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        sealed_shares = protocol.share(*self._own(client), self.adverts, self.hashes)
        return Response({}, Ciphertexts(sealed_shares=sealed_shares))

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Ciphertexts)
        if not reply.sealed_shares.keys() <= set(self.session.clients):
            raise WireError("it sends shares to clients that are not asked")


class Received(_Phase):
    """Decrypt the shares that your neighbors sent to you, and name the neighbors whose shares you cannot read."""

    KIND: ClassVar[str] = "rounds/secagg/received"
    REPLY: ClassVar[type[Reply]] = Unreadable

    sealed_shares: Annotated[dict[Name, SealedShares], ByClient]

    def _named(self) -> Collection[str]:
        return self.sealed_shares.keys()

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        session, name, _, store = self._own(client)
        return Response({}, Unreadable(unreadable=protocol.receive(session, name, store, self.sealed_shares)))

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Unreadable)
        if not set(reply.unreadable) <= self.sealed_shares.keys():
            raise WireError("it names shares that it was not sent")


class Check(_Phase):
    """Sign the list of clients whose responses are in the sum."""

    KIND: ClassVar[str] = "rounds/secagg/check"
    REPLY: ClassVar[type[Reply]] = Signed

    survivors: Clients

    def _named(self) -> Collection[str]:
        return self.survivors

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        return Response({}, Signed(signature=protocol.confirm(*self._own(client), self.survivors)))


class Open(_Phase):
    """Given the signatures of enough clients of the same list, reveal the shares that remove the remaining masks from
    the sum."""

    KIND: ClassVar[str] = "rounds/secagg/open"
    REPLY: ClassVar[type[Reply]] = Revealed

    signatures: Annotated[dict[Name, Signature], ByClient]

    def _named(self) -> Collection[str]:
        return self.signatures.keys()

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        return Response({}, Revealed.model_validate({"shares": protocol.reveal(*self._own(client), self.signatures)}))

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Revealed)
        if not reply.shares.keys() <= set(self.session.clients):
            raise WireError("it reveals shares of clients that were not asked")


def _check_known(session: Session, named: Collection[str]) -> None:
    others = set(named) - set(session.clients)
    if others:
        raise ValueError(f"'{min(others)}' is no client of this session")


def _credentials_of(client: LocalClient) -> Credentials:
    if client.credentials is None:
        raise client.error("it has no key and no roster for secure aggregation; give it both")
    return client.credentials


def _store_of(client: LocalClient) -> SessionStore:
    return SessionStore(client.folder / "secure", client.ledger)
