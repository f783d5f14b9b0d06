"""Keys of secure aggregation: long-term signing keys on a signed roster, and keys derived from a session's secrets.

Signatures are Ed25519, key agreement is X25519, derivation HKDF-SHA256 with the session's digest as salt, the channel
between two clients ChaCha20-Poly1305. Every derived key and every signature includes its purpose and its session, so
neither can be used for another purpose or session.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field

from fedgrove.privacy.secagg.session import SecureError, Session

KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES = 32, 64, 16


def hex_of(size: int) -> Any:
    """The bounds of so many bytes in hexadecimal, in a message."""
    return Field(pattern=rf"^[0-9a-f]{{{2 * size}}}$")


Key = Annotated[str, hex_of(KEY_BYTES)]
Signature = Annotated[str, hex_of(SIGNATURE_BYTES)]


@dataclass(frozen=True)
class Credentials:
    """What a client needs before its first session. Everything except ``key`` may be public.

    Attributes:
        key: its long-term private Ed25519 key, 32 bytes.
        roster: JSON ``{"clients": {name: public key in hex}}``.
        signature: the operator's signature of the roster, 64 bytes.
        operator: the operator's public Ed25519 key, 32 bytes, which this client received through a trusted channel.
        min_group: the client refuses sums of fewer clients.
    """

    key: bytes
    roster: bytes
    signature: bytes
    operator: bytes
    min_group: int = 3

    def public_key(self, client: str) -> bytes:
        """The long-term public key of a client, 32 bytes.

        Raises:
            SecureError: the roster is not signed by the operator, or does not list this client.
        """
        roster = _read_roster(self.operator, self.signature, self.roster)
        if client not in roster:
            raise SecureError(f"client '{client}' is not on the roster that the operator signed")
        return bytes.fromhex(roster[client])


@lru_cache(maxsize=8)
def _read_roster(operator: bytes, signature: bytes, roster: bytes) -> dict[str, str]:
    if not verify(operator, signature.hex(), roster):
        raise SecureError("the roster of clients is not signed by the operator", "get it again")
    public_keys: dict[str, str] = json.loads(roster)["clients"]
    return public_keys


def make_credentials(clients: Iterable[str], min_group: int = 3) -> dict[str, Credentials]:
    """Credentials by client, for clients simulated on one machine; the operator's private key is not kept."""
    operator = Ed25519PrivateKey.generate()
    private_keys = {client: Ed25519PrivateKey.generate() for client in sorted(clients)}
    public_keys = {client: key.public_key().public_bytes_raw().hex() for client, key in private_keys.items()}
    roster = json.dumps({"clients": public_keys}, sort_keys=True).encode()
    signature, operator_key = operator.sign(roster), operator.public_key().public_bytes_raw()
    return {
        client: Credentials(key.private_bytes_raw(), roster, signature, operator_key, min_group)
        for client, key in private_keys.items()
    }


@dataclass(frozen=True)
class Advert:
    """The public keys of a client for one session, all in hex.

    Attributes:
        mask_key: X25519, for pairwise masks.
        channel_key: X25519, for the encryption of shares.
        commitment: to the seed of the self-mask.
        signature: the client's signature of these three and of the session.
    """

    mask_key: Key
    channel_key: Key
    commitment: Key
    signature: Signature


def sign(key: bytes, message: bytes) -> str:
    """The signature by a long-term key, in hex."""
    return Ed25519PrivateKey.from_private_bytes(key).sign(message).hex()


def verify(public: bytes, signature: str, message: bytes) -> bool:
    """Whether a signature, in hex, of a message is valid for a long-term public key."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def advert_message(session: Session, client: str, advert: Advert) -> bytes:
    """The message that a client signs in phase 1: its name and public keys, and the session."""
    keys = {name: value for name, value in asdict(advert).items() if name != "signature"}
    return b"fedgrove keys" + session.digest + json.dumps([client, keys], sort_keys=True).encode()


def advert_hash(client: str, advert: Advert) -> str:
    """SHA-256 of a client's name and advert, in hex."""
    return hashlib.sha256(json.dumps([client, asdict(advert)], sort_keys=True).encode()).hexdigest()


def adverts_digest(session: Session, hashes: Mapping[str, str]) -> bytes:
    """The digest of a session and of all its adverts, 32 bytes: it differs each time a session is begun.

    Args:
        hashes: by client, :func:`advert_hash`, of all clients that sent keys.
    """
    return hashlib.sha256(session.digest + json.dumps(hashes, sort_keys=True).encode()).digest()


def survivors_message(adverts_digest: bytes, survivors: list[str]) -> bytes:
    """The message that a client signs in phase 5: the list of survivors, the session, and the keys of all its clients."""
    return b"fedgrove survivors" + adverts_digest + json.dumps(survivors).encode()


def session_key(seed: str, purpose: Literal["mask", "channel"], session: Session) -> X25519PrivateKey:
    """A client's private key, from the seed in hex."""
    return X25519PrivateKey.from_private_bytes(_derive(bytes.fromhex(seed), f"{purpose} key", session))


def public_hex(private: X25519PrivateKey) -> str:
    """The public key of a private key, in hex."""
    return private.public_key().public_bytes_raw().hex()


def is_usable(public: str) -> bool:
    """Whether X25519 accepts a public key, in hex; a point of small order would give no secret."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    except ValueError:
        return False
    return True


def pair_mask_key(private: X25519PrivateKey, public: str, session: Session, client: str, peer: str) -> bytes:
    """The key of the pairwise mask of two clients, 32 bytes; the same from either private key."""
    return _agree(private, public, "pair", session, client, peer)


def self_mask_key(seed: str, session: Session) -> bytes:
    """The key of a client's self-mask, 32 bytes, from the seed in hex."""
    return _derive(bytes.fromhex(seed), "self", session)


def commitment(seed: str, session: Session) -> str:
    """The commitment to the seed of a self-mask, in hex."""
    return _derive(bytes.fromhex(seed), "commitment", session).hex()


def _agree(private: X25519PrivateKey, public: str, purpose: str, session: Session, client: str, peer: str) -> bytes:
    common = private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    return _derive(common, f"{purpose}/{'/'.join(sorted((client, peer)))}", session)


def _derive(secret: bytes, purpose: str, session: Session) -> bytes:
    return HKDF(SHA256(), 32, session.digest, f"fedgrove/{purpose}".encode()).derive(secret)


@dataclass(frozen=True)
class Channel:
    """The encrypted channel of one client in one session.

    Attributes:
        private: the client's channel key.
        session: the session.
        adverts_digest: of all keys of the session, see :func:`adverts_digest`.
        client: the client's name.
    """

    private: X25519PrivateKey
    session: Session
    adverts_digest: bytes
    client: str

    def seal(self, peer: str, public: str, plain: bytes) -> str:
        """Encrypts a message for a peer, in hex; at most one for each peer in a session (the nonce is fixed).

        Args:
            public: the peer's channel key, in hex.
        """
        cipher = ChaCha20Poly1305(self._key(peer, public))
        return cipher.encrypt(_nonce(self.client, peer), plain, self._envelope(self.client, peer)).hex()

    def unseal(self, peer: str, public: str, sealed: str) -> bytes | None:
        """Decrypts what the peer's :meth:`seal` made for this client; None: it was not made by it for this session."""
        cipher = ChaCha20Poly1305(self._key(peer, public))
        try:
            return cipher.decrypt(_nonce(peer, self.client), bytes.fromhex(sealed), self._envelope(peer, self.client))
        except (InvalidTag, ValueError):
            return None

    def _key(self, peer: str, public: str) -> bytes:
        return _agree(self.private, public, "channel", self.session, self.client, peer)

    def _envelope(self, sender: str, receiver: str) -> bytes:
        return self.adverts_digest + json.dumps([sender, receiver]).encode()


def _nonce(sender: str, receiver: str) -> bytes:
    return bytes(11) + bytes([sender < receiver])  # a key encrypts one message per direction, so one bit suffices
