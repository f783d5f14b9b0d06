"""The client's part in the six phases of a secure sum; :mod:`fedgrove.privacy.secagg` describes the protocol.

Every function may be called again with the same arguments and gives the same result, except :func:`mask`: a session
masks only one input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedgrove.privacy.secagg import keys, masking, sharing
from fedgrove.privacy.secagg.keys import Advert, Channel, Credentials
from fedgrove.privacy.secagg.session import SecureError, Session
from fedgrove.privacy.secagg.sharing import Secret
from fedgrove.privacy.secagg.store import SessionState, SessionStore


def advertise(session: Session, client: str, credentials: Credentials, store: SessionStore) -> Advert:
    """Phase 1: makes the secrets of a session, and signs their public keys.

    Raises:
        SecureError: the sum is too small for this client, it does not include this client, or a client in it is not on
            the roster.
    """
    if client not in session.clients:
        raise SecureError("secure aggregation: the request is for a sum that does not include this client; refused")
    if len(session.clients) < credentials.min_group:
        raise SecureError(f"a sum of {len(session.clients)} clients is refused; {credentials.min_group} or more must take part")
    for other in session.clients:
        credentials.public_key(other)
    with store.opened(session, begin=True) as state:
        return _advert(session, client, credentials, state)


def share(
    session: Session,
    client: str,
    credentials: Credentials,
    store: SessionStore,
    adverts: Mapping[str, Advert],
    hashes: Mapping[str, str],
) -> dict[str, str]:
    """Phase 2: checks the neighbors' keys and encrypts for each of them a share of this client's two secrets.

    Neighbors whose keys are not signed by them, or of no use, get no shares, and no mask is shared with them.

    Args:
        adverts: by client, the keys of the neighbors that sent some. This client's own keys may be included.
        hashes: by client, :func:`keys.advert_hash`, of all clients that sent keys, neighbors or not.

    Returns:
        By neighbor, the encrypted shares in hex.

    Raises:
        SecureError: keys are not from a neighbor, are valid for too few of them, differ from those sent before, or do
            not fit the hashes.
    """
    adverts = {peer: advert for peer, advert in sorted(adverts.items()) if peer != client}
    neighbors = set(session.neighbors(client))
    if not set(adverts) <= neighbors or len(adverts) + 1 < session.threshold:
        raise SecureError("secure aggregation: keys of clients that are no neighbors, or of too few neighbors; refused")
    valid = {peer: advert for peer, advert in adverts.items() if _is_valid(session, peer, credentials, advert)}
    if len(valid) + 1 < session.threshold:
        invalid = min(adverts.keys() - valid.keys())
        raise SecureError(
            f"secure aggregation: the keys of client '{invalid}' are not signed by that client, or of no use; refused"
        )
    with store.opened(session) as state:
        shown = {**adverts, client: _advert(session, client, credentials, state)}
        expected = {peer: keys.advert_hash(peer, advert) for peer, advert in shown.items()}
        if not hashes.keys() <= set(session.clients) or expected != {
            peer: known for peer, known in hashes.items() if peer in neighbors or peer == client
        }:
            raise SecureError("secure aggregation: the keys of this session are not those that its clients sent; refused")
        digest = keys.adverts_digest(session, hashes)
        if state.adverts is None:
            state.adverts, state.adverts_digest = valid, digest.hex()
        if state.adverts != valid or state.adverts_digest != digest.hex():
            raise SecureError("secure aggregation: the keys differ from those sent before for the same session; refused")
        if state.sealed_shares is None:
            holders = session.holders(client)
            mask_shares = sharing.split(state.mask_seed, holders, session.threshold)
            self_shares = sharing.split(state.self_seed, holders, session.threshold)
            state.own_shares = {"mask": mask_shares[client], "self": self_shares[client]}
            channel = _channel(session, client, state)
            state.sealed_shares = {
                peer: channel.seal(peer, advert.channel_key, bytes.fromhex(mask_shares[peer] + self_shares[peer]))
                for peer, advert in valid.items()
            }
        return state.sealed_shares


def receive(session: Session, client: str, store: SessionStore, sealed_shares: Mapping[str, str]) -> list[str]:
    """Phase 3: decrypts the shares that the neighbors sent to this client.

    Args:
        sealed_shares: by neighbor, its encrypted shares.

    Returns:
        The neighbors whose shares were not made for this client in this session, sorted. The server decides who stays.

    Raises:
        SecureError: shares are from clients that are no neighbors, or differ from those sent before.
    """
    with store.opened(session) as state:
        if state.adverts is None or not sealed_shares.keys() <= set(session.neighbors(client)):
            raise SecureError("secure aggregation: shares of clients that are no neighbors of this one; refused")
        if state.received is None:
            channel = _channel(session, client, state)
            for peer in sealed_shares.keys() & state.adverts.keys():
                plain = channel.unseal(peer, state.adverts[peer].channel_key, sealed_shares[peer])
                if plain is not None and len(plain) == 2 * sharing.SHARE_BYTES:
                    mask_share, self_share = plain[: sharing.SHARE_BYTES], plain[sharing.SHARE_BYTES :]
                    state.held_shares[peer] = {"mask": mask_share.hex(), "self": self_share.hex()}
            state.received = dict(sealed_shares)
        if state.received != sealed_shares:
            raise SecureError("secure aggregation: the shares differ from those sent before for the same session; refused")
        return sorted(sealed_shares.keys() - state.held_shares.keys())


def mask(
    session: Session,
    client: str,
    store: SessionStore,
    peers: Sequence[str],
    tensors: Mapping[str, Tensor],
    sum_name: str,
) -> dict[str, Tensor]:
    """Phase 4: masks an input: adds this client's self-mask and its pairwise masks.

    Two inputs under the same masks would reveal their difference, so a session masks only one.

    Args:
        peers: the neighbors that mask their inputs, too.
        tensors: dtypes as in ``masking.RINGS``.
        sum_name: the name of the sum in the run, also in a later session.

    Returns:
        The masked tensors: same names, shapes and dtypes, on the CPU.

    Raises:
        SecureError: the session has already masked an input, or there are too few peers, or peers that are no neighbors.
    """
    peers = sorted(set(peers))
    with store.opened(session) as state:
        if state.adverts is None or state.received is None or state.peers is not None:
            raise SecureError("secure aggregation: this session has already masked an input, or has not begun; refused")
        if not set(peers) <= state.adverts.keys() or len(peers) + 1 < session.threshold:
            raise SecureError(
                "secure aggregation: masks with too few neighbors, or with clients that sent this one no valid keys; refused"
            )
        state.peers, state.sum_name = peers, sum_name
    hidden = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    rings = masking.as_rings(hidden)
    masking.add_keystream(rings, keys.self_mask_key(state.self_seed, session), +1)
    private = keys.session_key(state.mask_seed, "mask", session)
    for peer in peers:
        key = keys.pair_mask_key(private, state.adverts[peer].mask_key, session, client, peer)
        masking.add_keystream(rings, key, masking.pair_sign(client, peer))
    masking.reduce(rings, session)
    return hidden


def confirm(session: Session, client: str, credentials: Credentials, store: SessionStore, survivors: list[str]) -> str:
    """Phase 5: signs the list of the clients whose masked inputs are in the sum; one list per session.

    Returns:
        The signature in hex.

    Raises:
        SecureError: the list is too short, does not include this client, or differs from the list that this client
            signed before, in this session or in another one of the same sum.
    """
    if survivors != sorted(set(survivors)) or client not in survivors or not set(survivors) <= set(session.clients):
        raise SecureError("secure aggregation: the list of survivors is not a sorted list of clients of this session; refused")
    if len(survivors) < max(session.quorum, credentials.min_group):
        raise SecureError(f"secure aggregation: a sum of {len(survivors)} clients is too small to be opened")
    with store.opened(session) as state:
        if state.peers is None or (state.survivors or survivors) != survivors:
            raise SecureError("secure aggregation: this client is not in the sum, or signed another list; refused")
        store.agree_on_survivors(state.sum_name, client, survivors)
        state.survivors = survivors
        message = keys.survivors_message(bytes.fromhex(state.adverts_digest), survivors)
    return keys.sign(credentials.key, message)


def reveal(
    session: Session, client: str, credentials: Credentials, store: SessionStore, signatures: Mapping[str, str]
) -> dict[str, dict[Secret, str]]:
    """Phase 6: reveals shares: of the self-masks of surviving neighbors, of the mask keys of those that dropped out.

    The list that this client signed decides which of the two, so it never reveals both of one client. It reveals none of
    a neighbor with which it shares no mask. So a self-mask is recovered only if ``threshold`` survivors share a mask with
    its owner, and then the survivors cannot be split into parts whose sums could be opened.

    Args:
        signatures: by client, of that list, from at least ``threshold`` of this client and its neighbors. That is more
            than half of these clients, and each signs one list only.

    Returns:
        By owner of the secret, {"self": share} or {"mask": share}, in hex.

    Raises:
        SecureError: this client confirmed no list in this session, there are too few signatures, or one is wrong.
    """
    with store.opened(session) as state:
        if state.survivors is None or state.own_shares is None or state.peers is None:
            raise SecureError("secure aggregation: nothing was confirmed in this session; refused")
    message = keys.survivors_message(bytes.fromhex(state.adverts_digest), state.survivors)
    signers = set(session.holders(client)) & set(state.survivors)
    for name, signature in signatures.items():
        if name not in signers or not keys.verify(credentials.public_key(name), signature, message):
            raise SecureError(f"secure aggregation: client '{name}' did not sign this list of survivors; refused")
    if len(signatures) < session.threshold:
        raise SecureError(f"secure aggregation: {len(signatures)} clients signed the list, {session.threshold} must; refused")
    revealed: dict[str, dict[Secret, str]] = {}
    held_shares = {peer: state.held_shares[peer] for peer in state.peers if peer in state.held_shares}
    for owner, shares in {**held_shares, client: state.own_shares}.items():
        which: Secret = "self" if owner in state.survivors else "mask"
        revealed[owner] = {which: shares[which]}
    return revealed


def _advert(session: Session, client: str, credentials: Credentials, state: SessionState) -> Advert:
    """The client's signed keys of a session: always the same for the same state."""
    unsigned = Advert(
        mask_key=keys.public_hex(keys.session_key(state.mask_seed, "mask", session)),
        channel_key=keys.public_hex(keys.session_key(state.channel_seed, "channel", session)),
        commitment=keys.commitment(state.self_seed, session),
        signature="",
    )
    return replace(unsigned, signature=keys.sign(credentials.key, keys.advert_message(session, client, unsigned)))


def _is_valid(session: Session, client: str, credentials: Credentials, advert: Advert) -> bool:
    signed = keys.verify(credentials.public_key(client), advert.signature, keys.advert_message(session, client, advert))
    return signed and keys.is_usable(advert.mask_key) and keys.is_usable(advert.channel_key)


def _channel(session: Session, client: str, state: SessionState) -> Channel:
    private = keys.session_key(state.channel_seed, "channel", session)
    return Channel(private, session, bytes.fromhex(state.adverts_digest), client)
