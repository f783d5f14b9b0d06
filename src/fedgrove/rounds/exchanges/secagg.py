"""The four phases around a sum that is taken unseen: keys, shares, survivors, opening. See :mod:`fedgrove.privacy.secure`.

None of them discloses anything of a client's text. Between ``shares`` and ``check`` the sum's own request goes out; what has its
response masked travels beside that request, as :class:`Masking`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from fedgrove.client.local_client import LocalClient
from fedgrove.models.blocks import Decoder
from fedgrove.privacy import secure
from fedgrove.privacy.noise import agreed
from fedgrove.privacy.secure import SECRET, Session, SessionStore, credentials_of
from fedgrove.rounds.request import Reply, Request, Response, Tensors
from fedgrove.rounds.wire import WireError

Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Share = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * (SECRET + 1)}}}$")]
Ciphertext = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * (2 * (SECRET + 1) + 16)}}}$")]  # two shares and a tag of 16 bytes


class Advert(Reply):
    """The public halves of a client's keys for one sum, signed with its lasting key."""

    mask: Key
    channel: Key
    commitment: Key
    signature: Signature


class Ciphertexts(Reply):
    """For each neighbour the shares of this client's secrets, encrypted for the neighbour's eyes."""

    ciphertexts: dict[str, Ciphertext]


class Signed(Reply):
    """A client's signature of the list of survivors."""

    signature: Signature


class Revealed(Reply):
    """By owner one share: of the self-mask of a survivor (``self``), or of the mask key of a client that dropped (``seed``)."""

    shares: dict[str, Annotated[dict[str, Share], Field(min_length=1, max_length=1)]]


class Masking(BaseModel):
    """What has a response masked: the session, and what the neighbours sent to this client."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    session: Session
    ciphertexts: dict[str, Ciphertext]

    def apply(self, client: LocalClient, tensors: Mapping[str, object], release: str | None) -> Tensors:
        """A response's tensors, hidden: nobody can tell them from random ones."""
        credentials_of(client)
        store = SessionStore(client.folder / "secure")
        return secure.mask(self.session, client.name, store, self.ciphertexts, tensors, release)  # type: ignore[arg-type]


class _Phase(Request):
    session: Session

    def _own(self, client: LocalClient) -> tuple[Session, str, secure.Credentials, SessionStore]:
        return self.session, client.name, credentials_of(client), SessionStore(client.folder / "secure")


class Keys(_Phase):
    """Make two keys, and advertise their public halves."""

    KIND: ClassVar[str] = "rounds/secagg/keys"
    REPLY: ClassVar[type[Reply]] = Advert

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        return Response({}, Advert(**secure.keys(*self._own(client))))


class Shares(_Phase):
    """Check the neighbours' keys, and give each a share of this client's two secrets."""

    KIND: ClassVar[str] = "rounds/secagg/shares"
    REPLY: ClassVar[type[Reply]] = Ciphertexts

    adverts: dict[str, Advert]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        adverts = {peer: advert.model_dump() for peer, advert in self.adverts.items()}
        return Response({}, Ciphertexts(ciphertexts=secure.share(*self._own(client), adverts)))

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        assert isinstance(reply, Ciphertexts)
        if not reply.ciphertexts.keys() <= set(self.session.clients):
            raise WireError("it sends shares to clients that are not asked")


class Check(_Phase):
    """Sign the list of those whose responses are in the sum."""

    KIND: ClassVar[str] = "rounds/secagg/check"
    REPLY: ClassVar[type[Reply]] = Signed

    survivors: list[str]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        session, name, credentials, store = self._own(client)
        signed = secure.confirm(session, name, credentials, store, self.survivors)
        with store.opened(session) as own:
            release = own["release"]
        if release is not None:
            agreed(client.folder, release, name, self.survivors)
        return Response({}, Signed(**signed))


class Open(_Phase):
    """Shown that enough have signed the same list: give the shares that take the left-over masks off the sum."""

    KIND: ClassVar[str] = "rounds/secagg/open"
    REPLY: ClassVar[type[Reply]] = Revealed

    signatures: dict[str, Signature]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        return Response({}, Revealed(shares=secure.reveal(*self._own(client), self.signatures)))

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        assert isinstance(reply, Revealed)
        if not reply.shares.keys() <= set(self.session.clients):
            raise WireError("it reveals shares of clients that were not asked")
