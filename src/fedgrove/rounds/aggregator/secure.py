"""Sums under secure aggregation: the server learns the total, but no single client's part."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.files import write_atomically
from fedgrove.models.blocks import Decoder
from fedgrove.privacy.secagg import keys, server
from fedgrove.privacy.secagg.session import new_session
from fedgrove.rounds.aggregator.base import Accumulator
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.collect import collect
from fedgrove.rounds.exchanges.secagg import (
    Advert,
    Check,
    Ciphertexts,
    Keys,
    Masking,
    Open,
    Received,
    Revealed,
    Shares,
    Signed,
    Unreadable,
)
from fedgrove.rounds.request import Message, Reply, Request
from fedgrove.rounds.wire import WireError
from fedgrove.runfolder import RunFolder

SUMS = "work/secure-sums.json"

Said = TypeVar("Said", bound=Reply)


@dataclass(frozen=True)
class SecureAggregator:
    """Six exchanges for one sum: keys, shares, their receipt, the request itself with masked responses, survivors, opening."""

    engine: Engine
    run: RunFolder

    def aggregate(
        self,
        messages: Mapping[str, Message],
        into: Accumulator,
        *,
        layout: Decoder | None = None,
        clock: Clock | None = None,
    ) -> dict[str, Reply]:
        """See :meth:`fedgrove.rounds.aggregator.base.Aggregator.aggregate`.

        The clock counts the clients' computation in the request itself, not in the other five exchanges.

        Which clients are in a sum is decided once, before they sign it: clients refuse a second decision. So if an
        interrupted run is continued in between, the sum is that of the same clients.
        """
        sums = self._sums()
        name = next(iter(messages.values())).request.sum_name
        decided = sums.get(name)
        if decided is not None:
            _check_survivors(decided, messages)
            messages = {client: messages[client] for client in decided}
        messages = into.masked(messages)
        first, tensors = next(iter(messages.values()))
        session = new_session(messages, into.ring_bits(), first.sum_digest(dict(tensors)))
        place: dict[str, Any] = {"stage": first.stage, "round": first.round, "session": session}
        idle = Clock({name: replace(pace, compute=0.0) for name, pace in clock.paces.items()}, clock.spent) if clock else None

        def phase(requests: Mapping[str, Request], said: type[Said]) -> dict[str, Said]:
            sent = {client: Message(request) for client, request in requests.items()}
            found: dict[str, Said] = {}
            for client, _, reply in collect(self.engine, self.run, sent, clock=idle):
                assert isinstance(reply, said)
                found[client] = reply
            return found

        advertised = phase({client: Keys(**place) for client in messages}, Advert)
        adverts = {client: keys.Advert(**reply.model_dump()) for client, reply in advertised.items()}
        hashes = {client: keys.advert_hash(client, advert) for client, advert in adverts.items()}
        shares = {
            client: Shares(**place, adverts=server.adverts_for(session, client, adverts), hashes=hashes) for client in adverts
        }
        sealed = {client: reply.sealed_shares for client, reply in phase(shares, Ciphertexts).items()}
        received = {
            client: Received(**place, sealed_shares=server.sealed_shares_for(session, client, sealed)) for client in sealed
        }
        unreadable = {client: reply.unreadable for client, reply in phase(received, Unreadable).items()}
        sharers = server.clients_with_shares(session, sealed, unreadable)
        self._leave_out(sorted(unreadable.keys() - set(sharers)), len(sharers), len(messages))
        masking: dict[str, Any] = {}
        for client in sharers:
            peers = sorted(set(session.neighbors(client)) & set(sharers))
            masking[client] = Masking(session=session, peers=peers).model_dump(mode="json")
        opening = server.Opening(session, adverts, sharers)
        replies: dict[str, Reply] = {}
        asked = {client: messages[client] for client in sharers}
        for client, tensors, reply in collect(self.engine, self.run, asked, layout=layout, clock=clock, masking=masking):
            opening.add(client, tensors)
            replies[client] = reply
        survivors = opening.survivors
        _check_survivors(decided or [], survivors)
        self._keep_sums({**sums, name: survivors})
        signed = phase({client: Check(**place, survivors=survivors) for client in survivors}, Signed)
        signatures = {client: reply.signature for client, reply in signed.items()}
        shown = {client: server.signatures_for(session, client, signatures) for client in signed}
        opened = phase({client: Open(**place, signatures=shown[client]) for client in signed}, Revealed)
        total = opening.open({client: reply.shares for client, reply in opened.items()})
        for client in sorted(opening.liars):
            self.run.message(f"{client}: it sent a wrong share, which was left out")
        try:
            into.add_total(total, replies)
        except WireError as error:
            raise FedgroveError(
                f"the clients' sum: {error}",
                "one of them sent invalid values, and secure aggregation hides which; leave out one after another",
            ) from error
        return replies

    def _sums(self) -> dict[str, list[str]]:
        """By name of the sum, the clients in it, for all sums of this run whose clients were decided."""
        file = self.run.path / SUMS
        sums: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return sums

    def _keep_sums(self, sums: Mapping[str, list[str]]) -> None:
        write_atomically(self.run.path / SUMS, json.dumps(sums), fsync=True)

    def _leave_out(self, clients: list[str], left: int, asked: int) -> None:
        """Names clients whose shares too few others could read; raises FedgroveError if too few clients are left."""
        for client in clients:
            self.run.message(f"{client}: too few others could read its shares; it is left out of this sum")
        needed = min(self.run.job.rounds.quorum or asked, asked)
        if clients and left < needed:
            raise FedgroveError(
                f"too few others could read its shares ({left} of {asked} clients are left, {needed} needed: rounds.quorum)",
                client=clients[0],
            )


def _check_survivors(decided: list[str], clients: Collection[str]) -> None:
    """Raises FedgroveError if a client is missing that was in the sum when the run was interrupted."""
    missing = sorted(set(decided) - set(clients))
    if missing:
        raise FedgroveError(
            "it was in the sum that was under way when the run was stopped, and without it the others refuse that sum "
            f"({len(decided) - len(missing)} of {len(decided)} clients are there)",
            "continue with --resume when it is back, or run the job under another name",
            client=missing[0],
        )
