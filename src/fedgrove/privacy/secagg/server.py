"""The server's part in a secure sum: it forwards the clients' messages, adds up masked inputs, and removes the masks.

Callers must check the form of the clients' messages (names, lengths of keys and shares) first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from torch import Tensor

from fedgrove.privacy.secagg import keys, masking
from fedgrove.privacy.secagg.keys import Advert
from fedgrove.privacy.secagg.session import SecureError, Session
from fedgrove.privacy.secagg.sharing import Secret, find_secret

Revealed = Mapping[str, Mapping[str, Mapping[Secret, str]]]  # client -> owner of a secret -> which -> share in hex


def adverts_for(session: Session, client: str, adverts: Mapping[str, Advert]) -> dict[str, Advert]:
    """For phase 2: the keys of the client's neighbors that have sent theirs."""
    return {peer: adverts[peer] for peer in session.neighbors(client) if peer in adverts}


def sealed_shares_for(session: Session, client: str, sealed_shares: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """For phase 3: the shares that the client's neighbors encrypted for it.

    Args:
        sealed_shares: by sender, what :func:`fedgrove.privacy.secagg.client.share` returned.
    """
    return {peer: sealed_shares[peer][client] for peer in session.neighbors(client) if client in sealed_shares.get(peer, {})}


def clients_with_shares(
    session: Session, sealed_shares: Mapping[str, Mapping[str, str]], unreadable: Mapping[str, Collection[str]]
) -> list[str]:
    """For phase 4: the clients whose secrets could be recovered, sorted; the others take no part.

    Those whose shares fewer than ``threshold`` of the remaining clients could read are left out, one after the other.

    Args:
        sealed_shares: by sender, what :func:`fedgrove.privacy.secagg.client.share` returned.
        unreadable: by receiver, what :func:`fedgrove.privacy.secagg.client.receive` returned.
    """
    remaining = set(unreadable)

    def num_readers(client: str) -> int:
        readers = remaining & set(session.neighbors(client)) & set(sealed_shares[client])
        return 1 + sum(client not in unreadable[reader] for reader in readers)

    while remaining:
        fewest = min(sorted(remaining), key=num_readers)
        if num_readers(fewest) >= session.threshold:
            break
        remaining.remove(fewest)
    return sorted(remaining)


def signatures_for(session: Session, client: str, signatures: Mapping[str, str]) -> dict[str, str]:
    """For phase 6: the signatures of the client and its neighbors that have sent theirs."""
    return {holder: signatures[holder] for holder in session.holders(client) if holder in signatures}


class Opening:
    """The server's side of one sum: adds up masked inputs, then removes the masks from the sum.

    Memory: the size of one client's input, whatever the number of clients.

    Args:
        session: the public description of the sum.
        adverts: by client, the keys of the clients that sent some.
        sharers: the clients that were to mask an input: their pairwise masks are in their neighbors' inputs.

    Attributes:
        survivors: the clients whose inputs are in the sum, sorted.
        liars: the clients that revealed wrong shares which had to be left out.
    """

    def __init__(self, session: Session, adverts: Mapping[str, Advert], sharers: Iterable[str]):
        self.session = session
        self.adverts = adverts
        self.sharers = sorted(sharers)
        self.survivors: list[str] = []
        self.liars: set[str] = set()
        self._sum: dict[str, Tensor] = {}

    def add(self, client: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds a masked input; names, shapes and dtypes must be those of the first one."""
        if not self._sum:
            self._sum = {name: tensor.clone() for name, tensor in tensors.items()}
        else:
            for total, new in zip(masking.as_rings(self._sum), masking.as_rings(tensors), strict=True):
                np.add(total, new, out=total)
        self.survivors = sorted([*self.survivors, client])

    def open(self, revealed: Revealed) -> dict[str, Tensor]:
        """The sum of the survivors' tensors, in the dtypes that they sent. May be called once: it unmasks in place.

        Args:
            revealed: by client, what :func:`fedgrove.privacy.secagg.client.reveal` returned.

        Raises:
            SecureError: there are fewer shares of a secret than the threshold, or fewer right ones.
        """
        rings = masking.as_rings(self._sum)
        for client in self.survivors:
            seed = self.secret(client, "self", revealed)
            masking.add_keystream(rings, keys.self_mask_key(seed, self.session), -1)
        for dropped in sorted(set(self.sharers) - set(self.survivors)):
            peers = [client for client in self.session.neighbors(dropped) if client in self.survivors]
            if not peers:
                continue
            private = keys.session_key(self.secret(dropped, "mask", revealed), "mask", self.session)
            for client in peers:
                key = keys.pair_mask_key(private, self.adverts[client].mask_key, self.session, dropped, client)
                masking.add_keystream(rings, key, -masking.pair_sign(client, dropped))
        masking.reduce(rings, self.session)
        masking.restore_signs(rings, self.session)
        return self._sum

    def secret(self, owner: str, which: Secret, revealed: Revealed) -> str:
        """A client's secret in hex, recovered from shares that fit its commitment or its key.

        Wrong shares are left out where ``threshold`` right ones remain; their holders are added to ``liars``.

        Raises:
            SecureError: fewer shares than the threshold, or fewer right ones.
        """
        session, advert = self.session, self.adverts[owner]
        holders = session.holders(owner)
        given = {place: revealed.get(holder, {}).get(owner, {}).get(which) for place, holder in enumerate(holders)}
        shares = {place: share for place, share in given.items() if share is not None}
        if len(shares) < session.threshold:
            raise SecureError(
                f"secure aggregation: {len(shares)} shares of client '{owner}', {session.threshold} needed: "
                "too many clients dropped; nothing is opened"
            )

        def fits(seed: str) -> bool:
            if which == "self":
                return keys.commitment(seed, session) == advert.commitment
            return keys.public_hex(keys.session_key(seed, "mask", session)) == advert.mask_key

        suspects = [place for place, holder in enumerate(holders) if holder in self.liars]
        found = find_secret(shares, session.threshold, fits, suspects)
        if found is None:
            raise SecureError(
                f"secure aggregation: the shares of client '{owner}' do not fit together: it, or too many of those who hold "
                "them, sent wrong ones",
                f"leave out '{owner}', or run again",
            )
        secret, wrong = found
        self.liars |= {holders[place] for place in wrong}
        return secret
