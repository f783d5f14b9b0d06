"""The five phases around a sum under secure aggregation: keys, shares, receipt, survivors, opening.

See :mod:`fedgrove.privacy.secagg`. None of them discloses anything about a client's text. Between ``received`` and
``check`` the request for the sum itself is sent, together with a :class:`Masking`, by which the client masks its
response.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.privacy.secagg import client as protocol
from fedgrove.privacy.secagg import keys
from fedgrove.privacy.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES, Credentials
from fedgrove.privacy.secagg.session import Session
from fedgrove.privacy.secagg.sharing import SHARE_BYTES, Secret
from fedgrove.privacy.secagg.store import SessionStore
from fedgrove.rounds.request import Reply, Request, Response, Tensors
from fedgrove.rounds.wire import WireError


def _hex(size: int) -> Any:
    return Field(pattern=rf"^[0-9a-f]{{{2 * size}}}$")


Key = Annotated[str, _hex(KEY_BYTES)]
Signature = Annotated[str, _hex(SIGNATURE_BYTES)]
Share = Annotated[str, _hex(SHARE_BYTES)]
SealedShares = Annotated[str, _hex(2 * SHARE_BYTES + TAG_BYTES)]


class Advert(Reply):
    """The public halves of a client's keys for one sum, signed with its long-term key; see :class:`~keys.Advert`."""

    mask_key: Key
    channel_key: Key
    commitment: Key
    signature: Signature


class Ciphertexts(Reply):
    """For each neighbor the shares of this client's secrets, encrypted so that only the neighbor can read them."""

    sealed_shares: dict[str, SealedShares]


class Unreadable(Reply):
    """The neighbors whose shares this client could not decrypt."""

    unreadable: list[str]


class Signed(Reply):
    """A client's signature of the list of survivors: the clients whose responses are in the sum."""

    signature: Signature


class Revealed(Reply):
    """One share for each owner: of the self-mask of a survivor, or of the mask key of a client that dropped."""

    shares: dict[str, Annotated[dict[Secret, Share], Field(min_length=1, max_length=1)]]


class Masking(BaseModel):
    """What a client needs to mask its response: the session, and the neighbors that mask theirs, too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    session: Session
    peers: list[str]

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

    adverts: dict[str, keys.Advert]
    hashes: dict[str, Key]

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

    sealed_shares: dict[str, SealedShares]

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

    survivors: list[str]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        return Response({}, Signed(signature=protocol.confirm(*self._own(client), self.survivors)))


class Open(_Phase):
    """Given the signatures of enough clients of the same list, reveal the shares that remove the remaining masks from
    the sum."""

    KIND: ClassVar[str] = "rounds/secagg/open"
    REPLY: ClassVar[type[Reply]] = Revealed

    signatures: dict[str, Signature]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        return Response({}, Revealed.model_validate({"shares": protocol.reveal(*self._own(client), self.signatures)}))

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Revealed)
        if not reply.shares.keys() <= set(self.session.clients):
            raise WireError("it reveals shares of clients that were not asked")


def _credentials_of(client: LocalClient) -> Credentials:
    if client.credentials is None:
        raise client.error("it has no key and no roster for secure aggregation; give it both")
    return client.credentials


def _store_of(client: LocalClient) -> SessionStore:
    return SessionStore(client.folder / "secure", client.ledger)
