"""What secure aggregation costs: seconds and bytes of one sum, compared with the same sum in the open.

    .venv/bin/python bench/secure.py --write

All clients and the server run in this process, one after the other, on one thread; seconds are processor time, so that they are
the same on a busy machine. A message is counted as it would be sent: packed, unpacked, then added. Every opened sum is compared
with the plain one, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import page
import torch
from torch import Tensor

from fedgrove.privacy.secagg import client, server
from fedgrove.privacy.secagg.keys import advert_hash, make_credentials
from fedgrove.privacy.secagg.server import Opening
from fedgrove.privacy.secagg.session import new_session
from fedgrove.privacy.secagg.store import SessionStore
from fedgrove.rounds import wire
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum


@dataclass
class Cost:
    """Seconds by who spends them, and bytes that all clients send."""

    client: float = 0.0
    server: float = 0.0
    sent: int = 0
    names: list[str] = field(default_factory=list)

    @contextmanager
    def by(self, who: str) -> Iterator[None]:
        start = time.process_time()
        yield
        setattr(self, who, getattr(self, who) + time.process_time() - start)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--numbers", type=int, default=10_000_000)
    arguments.add_argument("--clients", type=int, default=16)
    arguments.add_argument(
        "--many", type=int, nargs="*", default=[25, 50, 100, 200], help="numbers of clients, 10 000 numbers each"
    )
    arguments.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(1)

    rows = ["| | client, each | server | all together | sent by a client |", "|---|---|---|---|---|"]
    plain, expected = in_the_open(given.clients, given.numbers)
    rows.append(row("in the open", plain, plain, given.clients))
    print(rows[-1], flush=True)
    drops = given.clients // 3
    for label, silent in (("secure", 0), (f"secure, {drops} drop after sharing keys", drops)):
        cost, opened = masked(given.clients, given.numbers, silent)
        for dropped in range(given.clients - silent, given.clients):
            expected -= numbers_of(dropped, given.numbers)
        assert torch.equal(opened, expected), "not the plain sum"
        rows.append(row(label, cost, plain, given.clients - silent))
        print(rows[-1], flush=True)
    many = ["| clients | neighbors | all together | by n·log₂ n | a client | server |", "|---|---|---|---|---|---|"]
    for number in given.many:
        cost, _ = masked(number, 10_000, 0)
        degree = new_session(f"{i}" for i in range(number)).degree
        together = cost.client + cost.server
        each = 1e3 * together / (number * math.log2(number))
        many.append(
            f"| {number} | {degree} | {together:.2f} s | {each:.1f} ms | {cost.client / number:.3f} s | {cost.server:.2f} s |"
        )
        print(many[-1], flush=True)
    text = "\n".join([*rows, "", *many])
    print(text)
    if given.write:
        page.write("secure", text)


def row(label: str, cost: Cost, plain: Cost, senders: int) -> str:
    together = cost.client + cost.server
    ratio = together / (plain.client + plain.server)
    return (
        f"| {label} | {cost.client / senders:.2f} s | {cost.server:.2f} s | {together:.2f} s ({ratio:.2f}×) "
        f"| {cost.sent / senders / 1e6:.2f} MB ({cost.sent / senders / (plain.sent / len(plain.names)):.3f}×) |"
    )


def numbers_of(client: int, count: int) -> Tensor:
    """Fixed-point numbers such as statistics are: 27 bits and a sign, near zero more often."""
    generator = torch.Generator().manual_seed(client)
    return (torch.randn(count, generator=generator) * 2**24).int()


def in_the_open(clients: int, count: int) -> tuple[Cost, Tensor]:
    cost, total = Cost(names=[f"c{i:03d}" for i in range(clients)]), WeightedSum()
    for i in range(clients):
        values = numbers_of(i, count)
        with cost.by("client"):
            message = wire.pack({"change/x": values}, {})
        cost.sent += len(message)
        with cost.by("server"):
            total.add(wire.unpack(message)[0]["change/x"], 1.0)
    assert total.value is not None
    return cost, total.value


def masked(clients: int, count: int, silent: int) -> tuple[Cost, Tensor]:
    cost = Cost(names=[f"c{i:03d}" for i in range(clients)])
    credentials = make_credentials(cost.names)
    session = new_session(cost.names)
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: SessionStore(Path(folder) / name) for name in cost.names}

        def sent(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> bytes:
            message = wire.pack(tensors, dict(info))
            cost.sent += len(message)
            return message

        with cost.by("client"):
            adverts = {name: client.advertise(session, name, credentials[name], stores[name]) for name in cost.names}
            for name in cost.names:
                sent({}, asdict(adverts[name]))
            sealed = {}
            hashes = {name: advert_hash(name, advert) for name, advert in adverts.items()}
            for name in cost.names:
                shown = server.adverts_for(session, name, adverts)
                sealed[name] = client.share(session, name, credentials[name], stores[name], shown, hashes)
                sent({}, sealed[name])
            for name in cost.names:
                unreadable = client.receive(session, name, stores[name], server.sealed_shares_for(session, name, sealed))
                sent({}, {"unreadable": unreadable})
        opening = Opening(session, adverts, sealed)
        for i, name in enumerate(cost.names[: clients - silent]):
            values = numbers_of(i, count)
            with cost.by("client"):
                hidden = client.mask(session, name, stores[name], session.neighbors(name), {"change/x": values}, "x")
                message = sent(hidden, {})
            with cost.by("server"):
                opening.add(name, wire.unpack(message)[0])
        with cost.by("client"):
            survivors = opening.survivors
            signatures = {name: client.confirm(session, name, credentials[name], stores[name], survivors) for name in survivors}
            revealed = {}
            for name in survivors:
                shown_signatures = server.signatures_for(session, name, signatures)
                revealed[name] = client.reveal(session, name, credentials[name], stores[name], shown_signatures)
                sent({}, {"signature": signatures[name]})
                sent({}, revealed[name])
        with cost.by("server"):
            opened = opening.open(revealed)["change/x"].long()
    return cost, opened


if __name__ == "__main__":
    main()
