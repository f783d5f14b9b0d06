"""A secure sum without jobs and engines: clients with real keys on real folders, run phase by phase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgrove.privacy.secagg import client, server
from fedgrove.privacy.secagg.keys import Advert, advert_hash, make_credentials
from fedgrove.privacy.secagg.server import Opening
from fedgrove.privacy.secagg.session import new_session
from fedgrove.privacy.secagg.store import SessionStore

PHASES = ("keys", "shares", "received", "masked", "check", "open")

Tensors = Mapping[str, torch.Tensor]


class Federation:
    """Clients that are asked phase by phase; those who fall silent respond no more from a phase on."""

    def __init__(self, folder: Path, number: int):
        self.names = [f"c{i:03d}" for i in range(number)]
        self.credentials = make_credentials(self.names, min_group=2)
        self.stores = {name: SessionStore(folder / name) for name in self.names}
        self.session = new_session(self.names)
        self.sum_name = "the sum"

    def advertise(self, names: Sequence[str]) -> dict[str, Advert]:
        return {name: client.advertise(self.session, name, self.credentials[name], self.stores[name]) for name in names}

    def share(self, name: str, adverts: Mapping[str, Advert]) -> dict[str, str]:
        shown = server.adverts_for(self.session, name, adverts)
        hashes = {peer: advert_hash(peer, advert) for peer, advert in adverts.items()}
        return client.share(self.session, name, self.credentials[name], self.stores[name], shown, hashes)

    def receive(self, name: str, sealed: Mapping[str, Mapping[str, str]]) -> list[str]:
        return client.receive(self.session, name, self.stores[name], server.sealed_shares_for(self.session, name, sealed))

    def mask(self, name: str, sharers: Sequence[str], tensors: Tensors) -> dict[str, torch.Tensor]:
        peers = [peer for peer in self.session.neighbors(name) if peer in sharers]
        return client.mask(self.session, name, self.stores[name], peers, tensors, self.sum_name)

    def confirm(self, name: str, survivors: list[str]) -> str:
        return client.confirm(self.session, name, self.credentials[name], self.stores[name], survivors)

    def reveal(self, name: str, signatures: Mapping[str, str]) -> dict[str, dict[str, str]]:
        return client.reveal(self.session, name, self.credentials[name], self.stores[name], signatures)

    def run(self, inputs: Mapping[str, Tensors], silent: Mapping[str, Sequence[str]] | None = None) -> Any:
        """The whole protocol.

        Args:
            silent: by phase, the clients that respond no more from there on.

        Returns:
            The survivors and the opened sum. What was sent on the way is in attributes.
        """
        gone: set[str] = set()

        def left(phase: str, names: Sequence[str]) -> list[str]:
            gone.update((silent or {}).get(phase, ()))
            return [name for name in names if name not in gone]

        self.adverts = self.advertise(left("keys", self.names))
        self.sealed = {name: self.share(name, self.adverts) for name in left("shares", list(self.adverts))}
        unreadable = {name: self.receive(name, self.sealed) for name in left("received", list(self.sealed))}
        self.sharers = server.clients_with_shares(self.session, self.sealed, unreadable)
        opening = Opening(self.session, self.adverts, self.sharers)
        self.masked = {}
        for name in left("masked", self.sharers):
            self.masked[name] = self.mask(name, self.sharers, inputs[name])
            opening.add(name, self.masked[name])
        self.signatures = {name: self.confirm(name, opening.survivors) for name in left("check", opening.survivors)}
        self.revealed = {
            name: self.reveal(name, server.signatures_for(self.session, name, self.signatures))
            for name in left("open", list(self.signatures))
        }
        self.liars = opening.liars
        return opening.survivors, opening.open(self.revealed)

    def summed(self) -> Opening:
        """The masked sum of the newest run, before it was opened."""
        opening = Opening(self.session, self.adverts, self.sharers)
        for name, tensors in self.masked.items():
            opening.add(name, tensors)
        return opening


def inputs_of(names: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Numbers of every ring, negative ones among them; of many clients each has few."""
    generator = torch.Generator().manual_seed(7)
    most = 70_001 if len(names) < 50 else 101
    return {
        name: {
            "counts": torch.randint(0, 2, (3, 11), generator=generator, dtype=torch.uint8),
            "small": torch.randint(-(2**24), 2**24, (most,), generator=generator, dtype=torch.int32),
            "large": torch.randint(-(2**50), 2**50, (5, 7), generator=generator, dtype=torch.int64),
        }
        for name in names
    }


def total(inputs: Mapping[str, Tensors], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The plain sum."""
    return {key: sum(inputs[name][key].long() for name in names) for key in inputs[names[0]]}  # type: ignore[misc]


def same(opened: Tensors, wanted: Tensors) -> bool:
    return all(torch.equal(opened[key].long(), wanted[key]) for key in wanted)


def uniform(values: np.ndarray[Any, Any]) -> bool:
    """A χ² test of the bytes: far from uniform with probability 10⁻⁶ where they are uniform."""
    counts = np.bincount(values.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * math.sqrt(2 * 255)
