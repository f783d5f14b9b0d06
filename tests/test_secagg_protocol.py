"""The secure sum: it is the plain sum bit for bit, whoever drops out, and takes no more bits than it needs."""

from __future__ import annotations

import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shamirs
import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.errors import FedgroveError
from fedgrove.privacy.secagg import server
from fedgrove.privacy.secagg.keys import Advert, advert_hash
from fedgrove.privacy.secagg.session import OtherSurvivors, SecureError, new_session
from fedgrove.privacy.secagg.sharing import PRIME, interpolate
from fedgrove.privacy.secagg.store import SessionStore
from fedgrove.rounds import wire
from fedgrove.rounds.exchanges import secagg as exchange
from fedgrove.rounds.request import Request, parse
from secagg import PHASES, Federation, inputs_of, same, total


@pytest.mark.parametrize("number", [2, 3, 8])
def test_the_sum_is_the_plain_sum_bit_for_bit(tmp_path: Path, number: int) -> None:
    federation = Federation(tmp_path, number)
    inputs = inputs_of(federation.names)
    survivors, opened = federation.run(inputs)
    assert survivors == federation.names
    assert same(opened, total(inputs, survivors))


@pytest.mark.parametrize("bits", [56, 45, 40])
def test_a_narrower_ring_gives_the_same_sum_in_fewer_bytes(tmp_path: Path, bits: int) -> None:
    federation = Federation(tmp_path, 3)
    federation.session = new_session(federation.names, bits)
    top = 2 ** (bits - 1) - 1
    inputs = {name: {"x": torch.tensor([-(top // 3), top // 3, -1, 0] * 5000)} for name in federation.names}
    _, opened = federation.run(inputs)
    assert same(opened, total(inputs, federation.names))
    assert len(wire.pack(federation.masked["c000"], {})) < 20_000 * (bits + 0.2) / 8 + 1500


@pytest.mark.parametrize("number", [3, 7, 8])
def test_a_vote_takes_no_more_bits_than_the_number_of_clients(tmp_path: Path, number: int) -> None:
    federation = Federation(tmp_path, number)
    inputs = {name: {"x": torch.tensor([0, 1] * 5000, dtype=torch.uint8)} for name in federation.names}
    _, opened = federation.run(inputs)
    assert same(opened, total(inputs, federation.names))
    counts = federation.masked["c000"]["x"].bincount()
    assert len(counts) == 2 ** number.bit_length()
    assert counts.min() > 0.8 * counts.double().mean()  # every value of the ring alike
    assert len(wire.pack(federation.masked["c000"], {})) < 10_000 * (number.bit_length() + 0.2) / 8 + 1500


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [3, 4, 8, 9])
def test_a_third_may_drop_in_any_phase(tmp_path: Path, number: int, phase: str) -> None:
    federation = Federation(tmp_path, number)
    inputs = inputs_of(federation.names)
    gone = federation.names[1::2][: number // 3]
    survivors, opened = federation.run(inputs, {phase: gone})
    early = phase in PHASES[:4]
    assert survivors == [name for name in federation.names if not early or name not in gone]
    assert same(opened, total(inputs, survivors))


def test_drops_in_every_phase_at_once(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 18)
    inputs = inputs_of(federation.names)
    survivors, opened = federation.run(inputs, dict(zip(PHASES, ([name] for name in federation.names[3::2]), strict=False)))
    assert len(survivors) == 14
    assert same(opened, total(inputs, survivors))


def test_many_clients_share_masks_with_their_neighbors_only(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 56)
    session = federation.session
    assert session.degree == 8 * math.ceil(math.log2(56)) < 55
    for name in federation.names:
        assert len(session.neighbors(name)) == session.degree
        assert all(name in session.neighbors(other) for other in session.neighbors(name))
    inputs = {name: {"x": torch.full((9,), i, dtype=torch.int32)} for i, name in enumerate(federation.names)}
    survivors, opened = federation.run(inputs, {"shares": federation.names[::9], "masked": federation.names[1::9]})
    assert 56 - len(survivors) == 14
    assert torch.equal(opened["x"], torch.full((9,), sum(int(name[1:]) for name in survivors), dtype=torch.int32))


def test_interpolation_agrees_with_the_library() -> None:
    secret = 2**128 - 1
    shares = shamirs.shares(secret, 9, modulus=PRIME, threshold=5)
    assert interpolate({share.index: share.value for share in shares[2:7]}) == shamirs.interpolate(shares[:5]) == secret


def test_too_many_drops_open_nothing(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    with pytest.raises(SecureError, match=r"too small to be opened|of too few|shares of client"):
        federation.run(inputs_of(federation.names), {"masked": federation.names[:3]})


def test_secrets_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    for _ in range(2):
        federation.session = new_session(federation.names)
        federation.run(inputs_of(federation.names))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 9
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_client_that_is_asked_again_gives_the_same_response(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4)
    inputs = inputs_of(federation.names)
    survivors, opened = federation.run(inputs)
    assert same(opened, total(inputs, survivors))
    assert federation.advertise(federation.names) == federation.adverts
    for name in federation.names:
        assert federation.share(name, federation.adverts) == federation.sealed[name]
        assert federation.confirm(name, survivors) == federation.signatures[name]
        assert federation.reveal(name, federation.signatures) == federation.revealed[name]


def test_requests_carry_the_protocol(tmp_path: Path) -> None:
    """Every message is packed and unpacked, as it would be over the wire."""
    federation = Federation(tmp_path, 4)
    session, names = federation.session, federation.names
    inputs = inputs_of(names)
    clients = {
        name: LocalClient(name, tmp_path / "clients" / name, tmp_path, None, (), None, {}, federation.credentials[name])
        for name in names
    }

    def said(name: str, request: Request) -> Any:
        _, info = wire.unpack(wire.pack({}, {"request": request.model_dump(mode="json")}))
        received = parse(request.KIND, info["request"])
        assert received.digest == request.digest
        reply = received.respond({}, clients[name], "cpu").reply
        reply = request.REPLY.model_validate_json(reply.model_dump_json())
        request.check_reply(reply)
        return reply

    adverts = {name: Advert(**said(name, exchange.Keys(stage=0, session=session)).model_dump()) for name in names}
    hashes = {name: advert_hash(name, advert) for name, advert in adverts.items()}
    sealed = {}
    for name in names:
        shown = server.adverts_for(session, name, adverts)
        request = exchange.Shares(stage=0, session=session, adverts=shown, hashes=hashes)
        sealed[name] = said(name, request).sealed_shares
    opening = server.Opening(session, adverts, names)
    unreadable = {}
    for name in names:
        received = server.sealed_shares_for(session, name, sealed)
        unreadable[name] = said(name, exchange.Received(stage=0, session=session, sealed_shares=received)).unreadable
    assert server.clients_with_shares(session, sealed, unreadable) == names
    for name in names[1:]:
        masking = exchange.Masking(session=session, peers=session.neighbors(name))
        masking = exchange.Masking.model_validate_json(masking.model_dump_json())
        opening.add(name, masking.apply(clients[name], "prune/block/0/0/0", inputs[name]))
    signatures = {
        name: said(name, exchange.Check(stage=0, session=session, survivors=opening.survivors)).signature
        for name in opening.survivors
    }
    revealed = {}
    for name in signatures:
        shown = dict(reversed(server.signatures_for(session, name, signatures).items()))  # in any order
        revealed[name] = said(name, exchange.Open(stage=0, session=session, signatures=shown)).shares
    assert same(opening.open(revealed), total(inputs, names[1:]))
    with pytest.raises(OtherSurvivors, match="already in a sum of other clients"):  # each noted with whom it was summed
        SessionStore(clients["c001"].folder / "secure").agree_on_survivors("prune/block/0/0/0", "c001", names)
    with pytest.raises(FedgroveError, match="'c001': it has no key and no roster"):
        exchange.Keys(stage=0, session=session).respond({}, replace(clients["c001"], credentials=None), "cpu")
