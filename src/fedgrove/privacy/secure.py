"""Secure aggregation: the server learns the sum of what clients send, and nothing of any one of them.

After Bonawitz et al., *Practical Secure Aggregation for Privacy-Preserving Machine Learning* (CCS 2017), the protocol
against an active server, five asks for one sum:

1. ``secure-keys``: every client makes two X25519 keys and signs them with its own lasting key.
2. ``secure-shares``: it checks its neighbours' signatures and sends each of them, encrypted, a Shamir share of its own two
   secrets: the seed of its mask key and the seed of its self-mask.
3. the ask itself: it adds to its answer one keystream of its own and one for each neighbour, which the neighbour subtracts.
4. ``secure-check``: the survivors sign the list of survivors.
5. ``secure-open``: shown that enough have signed the same list, each gives the server the shares of the self-masks of
   survivors and of the mask keys of those who dropped: never both of one client. With enough shares (``threshold``) the
   server takes the left-over masks off the sum.

The paper's: all of that. Of Bell et al., *Secure Single-Server Aggregation with (Poly)Logarithmic Overhead* (CCS 2020): with
many clients only neighbours on a ring share masks. Ours: the secrets are 16 bytes (keys are derived from them); a client
signs the session's parameters together with its keys, so that a server cannot tell clients different thresholds; the
survivors' self-masks are committed to, so that a wrong share is noticed; the neighbours are drawn from the session's
name, which the server chooses: that part holds only against a server that follows the protocol.

WeightedSum are taken in a ring: uint8 holds votes, 0 or 1 of each client, modulo the power of two that holds their number; int32
is taken modulo 2³², int64 modulo 2 to the session's bits. Whoever sends has to see to it that the true sum fits. What cannot be
told from random does not compress, so the bits of the ring are what travels. Nothing here hides the sum itself, nor who took
part, nor the shapes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedgrove.errors import FedgroveError

if TYPE_CHECKING:
    from fedgrove.client.local_client import LocalClient

Info = dict[str, Any]
Ints = np.ndarray[Any, Any]

PRIME = 2**128 + 51  # the first prime that is larger than every 16-byte secret
SECRET = 16
RINGS = {torch.uint8: np.uint8, torch.int32: np.uint32, torch.int64: np.uint64}
CHUNK = 2**17  # bytes of keystream that are made at once: they stay in a core's cache


class SecureError(FedgroveError):
    """A message that a client does not answer, or a sum that cannot be opened."""


@dataclass(frozen=True)
class Credentials:
    """What a client knows before the first ask; all but ``key`` may be known to all.

    Attributes:
        key: its lasting Ed25519 key, 32 bytes.
        roster: JSON ``{"clients": {name: public key in hex}}``.
        signature: the operator's, of the roster.
        operator: the operator's public Ed25519 key, which this client was given by other means and trusts.
        min_group: it takes part in no sum of fewer clients.
    """

    key: bytes
    roster: bytes
    signature: bytes
    operator: bytes
    min_group: int = 3

    def public_key(self, client: str) -> bytes:
        """The lasting public key of a client.

        Raises:
            SecureError: the roster is not the operator's, or does not hold this client.
        """
        known = _read_roster(self.operator, self.signature, self.roster)
        if client not in known:
            raise SecureError(f"client '{client}' is not on the roster that the operator signed")
        return bytes.fromhex(known[client])


@dataclass(frozen=True)
class Session:
    """The public facts of one sum. Every client signs them with its keys.

    Attributes:
        name: fresh for every sum.
        clients: who is asked, sorted.
        degree: how many neighbours each has; even, or all others.
        threshold: how many shares open a secret, of ``degree`` + 1, and how many of them must have signed the survivors.
        quorum: how many clients at least must survive.
        bits: of an int64 tensor's ring: no more than the sum needs.
    """

    name: str
    clients: tuple[str, ...]
    degree: int
    threshold: int
    quorum: int
    bits: int = 64

    def __post_init__(self) -> None:
        number = len(self.clients)
        if not all(type(fact) is int for fact in (self.degree, self.threshold, self.quorum, self.bits)):
            raise SecureError("secure aggregation: a session that is not understood")
        if sorted(set(self.clients)) != list(self.clients):
            raise SecureError("secure aggregation: the clients are not sorted, or named twice")
        if not 0 < self.degree < number or (self.degree % 2 and self.degree < number - 1):
            raise SecureError(f"secure aggregation: {self.degree} neighbours among {number} clients")
        if not self.degree + 1 < 2 * self.threshold <= 2 * (self.degree + 1):
            raise SecureError("secure aggregation: fewer than half of the shares would open a secret")
        if not number < 2 * self.quorum <= 2 * number:
            raise SecureError("secure aggregation: fewer than half of the clients would open a sum")
        if not 8 <= self.bits <= 64:
            raise SecureError("secure aggregation: a ring is of 8 to 64 bits")

    @classmethod
    def of(cls, facts: Any) -> Session:
        """From JSON that came from somewhere."""
        try:
            return cls(**{**facts, "clients": tuple(facts["clients"])})
        except (TypeError, KeyError) as fault:
            raise SecureError("secure aggregation: a session that is not understood") from fault

    @cached_property
    def digest(self) -> bytes:
        """All of it in 32 bytes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def ring_bits(self, itemsize: int) -> int:
        """Of the ring in which tensors of so many bytes a number are summed."""
        return {1: len(self.clients).bit_length(), 4: 32, 8: self.bits}[itemsize]

    def neighbours(self, client: str) -> list[str]:
        """Those with whom a client shares masks, sorted: the next on both sides of a ring that the name shuffles."""
        if self.degree >= len(self.clients) - 1:
            return [other for other in self.clients if other != client]
        ring = _ring(self)
        at, half = ring.index(client), self.degree // 2
        return sorted(ring[(at + step) % len(ring)] for step in range(-half, half + 1) if step)

    def holders(self, client: str) -> list[str]:
        """Those who hold shares of a client's secrets: its neighbours and itself."""
        return sorted([*self.neighbours(client), client])


@lru_cache(maxsize=8)
def _ring(session: Session) -> list[str]:
    return sorted(session.clients, key=lambda client: hashlib.sha256(f"{session.name}/{client}".encode()).digest())


@lru_cache(maxsize=8)
def _read_roster(operator: bytes, signature: bytes, roster: bytes) -> dict[str, str]:
    if not _verified(operator, signature, roster):
        raise SecureError("the roster of clients is not signed by the operator; get it again")
    known: dict[str, str] = json.loads(roster)["clients"]
    return known


def new_session(clients: Iterable[str], bits: int = 64) -> Session:
    """The facts of the next sum: everybody neighbours everybody up to about forty clients, then 8·log₂ n neighbours each.

    Among few clients, two thirds (rounded up) have to survive. Among many, two thirds of all and half of each
    neighbourhood: neighbourhoods are random, so some lose more than a third of their members when a third of all drops.
    """
    names = tuple(sorted(clients))
    number = len(names)
    if number < 2:
        raise SecureError("secure aggregation: a sum of one client is its own; there must be at least two")
    quorum = smallest_sum(number)
    degree = 8 * math.ceil(math.log2(number))
    if degree >= number - 1:
        return Session(secrets.token_hex(16), names, number - 1, quorum, quorum, bits)
    return Session(secrets.token_hex(16), names, degree, degree // 2 + 2, quorum, bits)


def smallest_sum(clients: int) -> int:
    """How many of so many clients are in any sum that is opened: two thirds, and more than half."""
    return max(clients - clients // 3, clients // 2 + 1)


# What a client does


def keys(session: Session, client: str, credentials: Credentials, memory: SessionStore) -> Info:
    """Makes the secrets of a session, and advertises their public halves under the client's signature."""
    if client not in session.clients:
        raise SecureError("secure aggregation: this client is asked into a sum that it is no part of")
    if len(session.clients) < credentials.min_group:
        raise SecureError(f"a sum of {len(session.clients)} clients is refused; it takes {credentials.min_group} or more")
    for other in session.clients:
        credentials.public_key(other)
    with memory.opened(session, begin=True) as own:
        if "seed" not in own:
            own |= {"seed": secrets.token_hex(SECRET), "self": secrets.token_hex(SECRET), "channel": secrets.token_hex(SECRET)}
        advert = {
            "mask": _public(_private(own["seed"], "mask", session)).hex(),
            "channel": _public(_private(own["channel"], "channel", session)).hex(),
            "commitment": _commitment(own["self"], session),
        }
        own["advert"] = advert
    return {**advert, "signature": _sign(credentials.key, _advert_bytes(session, client, advert)).hex()}


def share(session: Session, client: str, credentials: Credentials, memory: SessionStore, adverts: Mapping[str, Info]) -> Info:
    """Checks the neighbours' keys and gives each, encrypted for its eyes, a share of this client's two secrets."""
    import shamirs
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    peers = sorted(set(adverts) - {client})
    if not set(peers) <= set(session.neighbours(client)) or len(peers) + 1 < session.threshold:
        raise SecureError("secure aggregation: keys of others than the neighbours, or of too few of them")
    for peer in peers:
        advert = adverts[peer]
        signed = _advert_bytes(session, peer, {key: advert[key] for key in ("mask", "channel", "commitment")})
        if not _verified(credentials.public_key(peer), bytes.fromhex(advert["signature"]), signed):
            raise SecureError(f"secure aggregation: the keys of client '{peer}' are not signed by it; refused")
    with memory.opened(session) as own:
        if own.setdefault("adverts", {peer: dict(adverts[peer]) for peer in peers}) != {p: dict(adverts[p]) for p in peers}:
            raise SecureError("secure aggregation: other keys than before were sent for the same session; refused")
        if "ciphertexts" not in own:
            holders = session.holders(client)
            split = {
                secret: shamirs.shares(int(own[secret], 16), len(holders), modulus=PRIME, threshold=session.threshold)
                for secret in ("seed", "self")
            }
            of = {
                holder: {secret: split[secret][i].value.to_bytes(SECRET + 1, "big") for secret in split}
                for i, holder in enumerate(holders)
            }
            own["kept"] = {secret: value.hex() for secret, value in of[client].items()}
            own["ciphertexts"] = {}
            private = _private(own["channel"], "channel", session)
            for peer in peers:
                cipher = ChaCha20Poly1305(_agree(private, adverts[peer]["channel"], "channel", session, client, peer))
                plain = of[peer]["seed"] + of[peer]["self"]
                own["ciphertexts"][peer] = cipher.encrypt(_nonce(client, peer), plain, _between(session, client, peer)).hex()
        ciphertexts: Info = own["ciphertexts"]
    return ciphertexts


def mask(
    session: Session,
    client: str,
    memory: SessionStore,
    ciphertexts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    release: str | None = None,
) -> dict[str, Tensor]:
    """Hides an answer: adds this client's own keystream, and for each neighbour one that the neighbour subtracts.

    A session hides one answer: two under the same masks would show their difference, so a second one is refused.

    Args:
        ciphertexts: what the neighbours sent to this client; those who did not are left out.
        tensors: dtypes as in ``RINGS``.
        release: names what is released, where it is noisy; see :func:`fedgrove.privacy.noise.agreed`.
    """
    with memory.opened(session) as own:
        if "adverts" not in own or own.get("answered"):
            raise SecureError("secure aggregation: this session has had its answer, or has not begun; refused")
        peers = sorted(ciphertexts)
        if not set(peers) <= set(own["adverts"]) or len(peers) + 1 < session.threshold:
            raise SecureError("secure aggregation: shares of others than the neighbours, or of too few of them")
        channel = _private(own["channel"], "channel", session)
        own["held"] = {
            peer: _decrypted(channel, own["adverts"][peer], session, client, peer, ciphertexts[peer]) for peer in peers
        }
        own["answered"], own["release"] = True, release
    hidden = {name: tensors[name].detach().cpu().contiguous().clone() for name in tensors}
    rings = as_rings(hidden)
    add_keystream(rings, _self_key(own["self"], session), +1)
    private = _private(own["seed"], "mask", session)
    for peer in peers:
        add_keystream(rings, _pair_key(private, own["adverts"][peer]["mask"], session, client, peer), _sign_of(client, peer))
    for ring in rings:
        ring &= ring.dtype.type(2 ** session.ring_bits(ring.itemsize) - 1)
    return hidden


def confirm(session: Session, client: str, credentials: Credentials, memory: SessionStore, survivors: list[str]) -> Info:
    """Signs the list of those whose answers are in the sum; one list a session."""
    if survivors != sorted(set(survivors)) or client not in survivors or not set(survivors) <= set(session.clients):
        raise SecureError("secure aggregation: a list of survivors that is none")
    if len(survivors) < max(session.quorum, credentials.min_group):
        raise SecureError(f"secure aggregation: a sum of {len(survivors)} clients is too small to be opened")
    with memory.opened(session) as own:
        if not own.get("answered") or own.setdefault("survivors", survivors) != survivors:
            raise SecureError("secure aggregation: this client has no part in the sum, or signed another list; refused")
    return {"signature": _sign(credentials.key, _survivors_bytes(session, survivors)).hex()}


def reveal(
    session: Session, client: str, credentials: Credentials, memory: SessionStore, signatures: Mapping[str, str]
) -> Info:
    """Gives out a share of the self-mask of every neighbour that survived, and of the mask key of every one that dropped.

    Which of the two follows from the list that this client signed itself, so it never gives out both of one client.

    Args:
        signatures: of that list, by ``threshold`` of this client and its neighbours at least. Two neighbourhoods that lie
            side by side on the ring cannot both have so many for different lists.
    """
    with memory.opened(session) as own:
        if "survivors" not in own:
            raise SecureError("secure aggregation: nothing was confirmed in this session; refused")
        survivors = own["survivors"]
    signed = _survivors_bytes(session, survivors)
    near = set(session.holders(client)) & set(survivors)
    for name, signature in signatures.items():
        if name not in near or not _verified(credentials.public_key(name), bytes.fromhex(signature), signed):
            raise SecureError(f"secure aggregation: client '{name}' did not sign this list of survivors; refused")
    if len(signatures) < session.threshold:
        raise SecureError(f"secure aggregation: {len(signatures)} clients signed the list, {session.threshold} must; refused")
    held = {**own["held"], client: own["kept"]}
    return {
        owner: {"self": shares["self"]} if owner in survivors else {"seed": shares["seed"]} for owner, shares in held.items()
    }


# What the server does


class Opening:
    """The server's side of one sum: takes masked answers in, then takes the masks off their sum.

    Memory: one answer's worth, whatever the number of clients.

    Args:
        session: the sum.
        adverts: by client, what :func:`keys` said; those who fell silent are left out.
        sharers: who sent shares: their masks are in their neighbours' answers.
    """

    def __init__(self, session: Session, adverts: Mapping[str, Info], sharers: Iterable[str]):
        self.session = session
        self.adverts = adverts
        self.sharers = sorted(sharers)
        self.survivors: list[str] = []
        self._sum: dict[str, Tensor] = {}

    def add(self, client: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds a masked answer."""
        if not self._sum:
            self._sum = {name: tensor.clone() for name, tensor in tensors.items()}
        else:
            for total, new in zip(as_rings(self._sum), as_rings(tensors), strict=True):
                np.add(total, new, out=total)
        self.survivors = sorted([*self.survivors, client])

    def open(self, revealed: Mapping[str, Info]) -> dict[str, Tensor]:
        """The sum of the survivors' tensors, in the dtypes that they sent.

        Args:
            revealed: by client, what :func:`reveal` said.

        Raises:
            SecureError: fewer shares than the threshold, or shares that are not those of the secret.
        """
        rings = as_rings(self._sum)
        for client in self.survivors:
            secret = self._secret(client, "self", revealed)
            if _commitment(secret, self.session) != self.adverts[client]["commitment"]:
                raise SecureError(f"secure aggregation: the shares of client '{client}' do not fit together; ask again")
            add_keystream(rings, _self_key(secret, self.session), -1)
        for dropped in sorted(set(self.sharers) - set(self.survivors)):
            left = [client for client in self.session.neighbours(dropped) if client in self.survivors]
            if not left:
                continue
            private = _private(self._secret(dropped, "seed", revealed), "mask", self.session)
            if _public(private).hex() != self.adverts[dropped]["mask"]:
                raise SecureError(f"secure aggregation: the shares of client '{dropped}' do not fit together; ask again")
            for client in left:
                key = _pair_key(private, self.adverts[client]["mask"], self.session, dropped, client)
                add_keystream(rings, key, -_sign_of(client, dropped))
        for ring in rings:
            ring &= ring.dtype.type(2 ** self.session.ring_bits(ring.itemsize) - 1)
            if ring.itemsize == 8:  # the highest bit of the ring is the sign
                ring <<= np.uint64(64 - self.session.bits)
                signed = ring.view(np.int64)
                signed >>= np.int64(64 - self.session.bits)
        return self._sum

    def _secret(self, owner: str, which: str, revealed: Mapping[str, Info]) -> str:
        shares: dict[int, int] = {}
        for i, holder in enumerate(self.session.holders(owner)):
            value = revealed.get(holder, {}).get(owner, {}).get(which)
            if value is not None and len(shares) < self.session.threshold:
                shares[i + 1] = int(value, 16)
        if len(shares) < self.session.threshold:
            raise SecureError(
                f"secure aggregation: {len(shares)} shares of client '{owner}', {self.session.threshold} needed: "
                "too many clients dropped; nothing is opened"
            )
        secret = at_zero(shares)
        return f"{secret % 2 ** (8 * SECRET):0{2 * SECRET}x}"


def at_zero(shares: Mapping[int, int]) -> int:
    """Lagrange's interpolation at 0 modulo ``PRIME``: the secret of Shamir shares {index: value}.

    ``shamirs.interpolate`` gives the same, with an inversion for every pair of shares where this needs one for each share:
    a hundred times slower among a hundred clients.
    """
    secret = 0
    for i, value in shares.items():
        above, below = value, 1
        for j in shares:
            if j != i:
                above = above * j % PRIME
                below = below * (j - i) % PRIME
        secret += above * pow(below, -1, PRIME)
    return secret % PRIME


# Rings and keystreams


def as_rings(tensors: Mapping[str, Tensor]) -> list[Ints]:
    """Views of the tensors, by name, as unsigned integers that wrap around.

    Raises:
        SecureError: a dtype that is no ring.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in RINGS:
            raise SecureError(f"secure aggregation: {name} is {tensor.dtype}; only whole numbers can be summed")
    return [tensors[name].reshape(-1).numpy().view(RINGS[tensors[name].dtype]) for name in sorted(tensors)]


def add_keystream(rings: list[Ints], key: bytes, sign: int) -> None:
    """Adds (+1) or subtracts (−1) the ChaCha20 keystream of a key, in place: each ring with a nonce of its own."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    zeros, stream = bytes(CHUNK), bytearray(CHUNK + 64)
    act = np.add if sign > 0 else np.subtract
    for number, ring in enumerate(rings):
        encryptor = Cipher(ChaCha20(key, bytes(8) + number.to_bytes(8, "little")), mode=None).encryptor()
        step = CHUNK // ring.itemsize
        for at in range(0, ring.size, step):
            part = ring[at : at + step]
            encryptor.update_into(zeros[: part.nbytes] if part.nbytes < CHUNK else zeros, stream)
            act(part, np.frombuffer(stream, part.dtype, part.size), out=part)


class SessionStore:
    """A client's secrets of the running session, on its own disk, readable by its owner alone.

    Only the newest session is kept: what an older one hid stays hidden.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def opened(self, session: Session, begin: bool = False) -> Iterator[Info]:
        """What this client remembers of a session; changes are on the disk before anything is answered.

        Raises:
            SecureError: the session is not the one that was begun last.
        """
        path = self.folder / f"{session.digest.hex()}.json"
        if path.is_file():
            own: Info = json.loads(path.read_text(encoding="utf-8"))
        elif begin:
            own = {}
            for older in self.folder.glob("*.json"):
                older.unlink()
        else:
            raise SecureError("secure aggregation: a session that this client did not begin, or that is over; refused")
        before = json.dumps(own)
        yield own
        if json.dumps(own) != before:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".partial")
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(json.dumps(own))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)


def credentials_of(client: LocalClient) -> Credentials:
    """A client's credentials.

    Raises:
        SecureError: it has none.
    """
    if client.credentials is None:
        raise SecureError(f"client '{client.name}': it has no key and no roster for secure aggregation; give it both")
    return client.credentials


def make_credentials(clients: Iterable[str], min_group: int = 3) -> dict[str, Credentials]:
    """Credentials of clients that are simulated on one machine: the operator's key is made, used and forgotten here."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    operator = Ed25519PrivateKey.generate()
    own = {client: Ed25519PrivateKey.generate() for client in sorted(clients)}
    public = {client: key.public_key().public_bytes_raw().hex() for client, key in own.items()}
    roster = json.dumps({"clients": public}, sort_keys=True).encode()
    signature, known = operator.sign(roster), operator.public_key().public_bytes_raw()
    return {client: Credentials(key.private_bytes_raw(), roster, signature, known, min_group) for client, key in own.items()}


# Keys and signatures


def _derive(secret: bytes, purpose: str, session: Session) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, session.digest, f"fedgrove/{purpose}".encode()).derive(secret)


def _private(seed: str, purpose: str, session: Session) -> Any:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(_derive(bytes.fromhex(seed), f"{purpose} key", session))


def _public(private: Any) -> bytes:
    raw: bytes = private.public_key().public_bytes_raw()
    return raw


def _agree(private: Any, public: str, purpose: str, session: Session, one: str, other: str) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    common = private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    return _derive(common, f"{purpose}/{'/'.join(sorted((one, other)))}", session)


def _pair_key(private: Any, public: str, session: Session, one: str, other: str) -> bytes:
    return _agree(private, public, "pair", session, one, other)


def _self_key(secret: str, session: Session) -> bytes:
    return _derive(bytes.fromhex(secret), "self", session)


def _commitment(secret: str, session: Session) -> str:
    return _derive(bytes.fromhex(secret), "commitment", session).hex()


def _nonce(sender: str, receiver: str) -> bytes:
    return bytes(11) + bytes([sender < receiver])  # a channel's key is used once each way


def _between(session: Session, sender: str, receiver: str) -> bytes:
    return session.digest + json.dumps([sender, receiver]).encode()


def _decrypted(private: Any, advert: Info, session: Session, client: str, peer: str, ciphertext: str) -> dict[str, str]:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    cipher = ChaCha20Poly1305(_agree(private, advert["channel"], "channel", session, client, peer))
    try:
        plain = cipher.decrypt(_nonce(peer, client), bytes.fromhex(ciphertext), _between(session, peer, client))
    except (InvalidTag, ValueError) as fault:
        raise SecureError(f"secure aggregation: the shares of client '{peer}' were changed on their way; refused") from fault
    return {"seed": plain[: SECRET + 1].hex(), "self": plain[SECRET + 1 :].hex()}


def _sign_of(client: str, peer: str) -> int:
    """Whether a client adds or subtracts the mask that it shares with a peer."""
    return 1 if client < peer else -1


def _advert_bytes(session: Session, client: str, advert: Mapping[str, str]) -> bytes:
    return b"fedgrove keys" + session.digest + json.dumps([client, dict(advert)], sort_keys=True).encode()


def _survivors_bytes(session: Session, survivors: list[str]) -> bytes:
    return b"fedgrove survivors" + session.digest + json.dumps(survivors).encode()


def _sign(key: bytes, message: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(key).sign(message)


def _verified(public: bytes, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
