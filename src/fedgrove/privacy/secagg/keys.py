"""Keys of secure aggregation: long-term signing keys on a signed roster, and what a session's secrets are turned into.

Signatures are Ed25519, key agreement is X25519, derivation HKDF-SHA256 with the session's digest as salt, the channel
between two clients ChaCha20-Poly1305. Everything that is derived or signed names its purpose and its session, so nothing of
one session or purpose is of use in another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedgrove.privacy.secagg.session import SecureError, Session

KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES = 32, 64, 16


@dataclass(frozen=True)
class Credentials:
    """What a client has before its first session. All but ``key`` may be public.

    Attributes:
        key: its long-term Ed25519 key, 32 bytes.
        roster: JSON ``{"clients": {name: public key in hex}}``.
        signature: the operator's, of the roster.
        operator: the operator's public Ed25519 key, which this client got by other means and trusts.
        min_group: it takes part in no sum of fewer clients.
    """

    key: bytes
    roster: bytes
    signature: bytes
    operator: bytes
    min_group: int = 3

    def public_key(self, client: str) -> bytes:
        """The long-term public key of a client, 32 bytes.

        Raises:
            SecureError: the roster is not signed by the operator, or does not hold this client.
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
    """Credentials by client, for clients that are simulated on one machine: the operator's key is made, used and forgotten."""
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
        channel_key: X25519, for the channel through which shares travel.
        commitment: to the seed of the self-mask.
        signature: the client's, of the three and of the session.
    """

    mask_key: str
    channel_key: str
    commitment: str
    signature: str


def sign(key: bytes, message: bytes) -> str:
    """The signature by a long-term key, in hex."""
    return Ed25519PrivateKey.from_private_bytes(key).sign(message).hex()


def verify(public: bytes, signature: str, message: bytes) -> bool:
    """Whether a signature in hex is the one of a message by the holder of a long-term key."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def advert_message(session: Session, client: str, advert: Advert) -> bytes:
    """What a client signs of its keys."""
    keys = {name: value for name, value in asdict(advert).items() if name != "signature"}
    return b"fedgrove keys" + session.digest + json.dumps([client, keys], sort_keys=True).encode()


def survivors_message(session: Session, survivors: list[str]) -> bytes:
    """What a client signs of a list of survivors."""
    return b"fedgrove survivors" + session.digest + json.dumps(survivors).encode()


def session_key(seed: str, purpose: Literal["mask", "channel"], session: Session) -> X25519PrivateKey:
    """A client's private key, from the seed in hex."""
    return X25519PrivateKey.from_private_bytes(_derive(bytes.fromhex(seed), f"{purpose} key", session))


def public_hex(private: X25519PrivateKey) -> str:
    """The public half of a key, in hex."""
    return private.public_key().public_bytes_raw().hex()


def pair_mask_key(private: X25519PrivateKey, public: str, session: Session, client: str, peer: str) -> bytes:
    """The key of the mask that two clients share, 32 bytes; the same whichever of the two private keys it is made from."""
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


def seal(private: X25519PrivateKey, public: str, session: Session, sender: str, receiver: str, plain: bytes) -> str:
    """Encrypts for the receiver alone, in hex; at most one message each way in a session.

    Args:
        private: the sender's channel key.
        public: the receiver's, in hex.
    """
    cipher = ChaCha20Poly1305(_agree(private, public, "channel", session, sender, receiver))
    return cipher.encrypt(_nonce(sender, receiver), plain, _envelope(session, sender, receiver)).hex()


def unseal(private: X25519PrivateKey, public: str, session: Session, sender: str, receiver: str, sealed: str) -> bytes:
    """Decrypts what :func:`seal` made.

    Args:
        private: the receiver's channel key.
        public: the sender's, in hex.

    Raises:
        SecureError: it is not what the sender sent to this receiver in this session.
    """
    cipher = ChaCha20Poly1305(_agree(private, public, "channel", session, sender, receiver))
    try:
        return cipher.decrypt(_nonce(sender, receiver), bytes.fromhex(sealed), _envelope(session, sender, receiver))
    except (InvalidTag, ValueError) as error:
        raise SecureError(f"secure aggregation: the shares of client '{sender}' were changed on their way; refused") from error


def _nonce(sender: str, receiver: str) -> bytes:
    return bytes(11) + bytes([sender < receiver])  # each direction has one message, so one bit tells all nonces of a key apart


def _envelope(session: Session, sender: str, receiver: str) -> bytes:
    return session.digest + json.dumps([sender, receiver]).encode()
