"""Attacks on the secure sum: what the server sees cannot be told from random, and what would open more is refused."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import shamirs
import torch
from pydantic import ValidationError

from fedgrove.client.local_client import LocalClient
from fedgrove.client.serve import read, serve
from fedgrove.privacy.secagg import client, keys, masking, sharing
from fedgrove.privacy.secagg.keys import make_credentials
from fedgrove.privacy.secagg.masking import as_rings
from fedgrove.privacy.secagg.session import SecureError, Session, new_session
from fedgrove.privacy.secagg.sharing import PRIME
from fedgrove.privacy.secagg.store import SessionStore
from fedgrove.rounds import wire
from fedgrove.rounds.exchanges.secagg import Advert, Ciphertexts, Open, Revealed, Shares, Unreadable
from fedgrove.rounds.request import Part, Reply, RequestError, parse
from fedgrove.rounds.wire import WireError
from secagg import Federation, inputs_of, same, total, uniform
from small import ROOT


def test_what_the_server_sees_cannot_be_told_from_random(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4)
    zeros = {name: {"x": torch.zeros(100_000, dtype=torch.int32)} for name in federation.names}
    federation.run(zeros)
    seen = [as_rings(federation.masked[name])[0] for name in federation.names]
    assert not uniform(as_rings(zeros[federation.names[0]])[0])
    for i, mine in enumerate(seen):
        assert uniform(mine)
        for theirs in seen[:i]:  # no two inputs hold the same mask, nor opposite ones
            assert uniform(mine - theirs)
            assert uniform(mine + theirs)
    assert uniform(seen[0] + seen[1] + seen[2])  # all but one of them tell no more than each
    again = Federation(tmp_path / "again", 4)
    again.run(zeros)
    assert uniform(seen[0] - as_rings(again.masked[again.names[0]])[0])


def test_the_late_input_of_a_dropped_client_stays_closed(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 5)
    inputs = inputs_of(federation.names)
    late = federation.names[2]
    survivors, opened = federation.run(inputs, {"masked": [late]})
    assert same(opened, total(inputs, survivors))
    answer = federation.mask(late, federation.sharers, inputs[late])  # it comes after the sum was opened
    assert all("self" not in given[late] for given in federation.revealed.values())
    rings = as_rings(answer)
    seed = federation.summed().secret(late, "mask", federation.revealed)
    private = keys.session_key(seed, "mask", federation.session)
    for peer in federation.session.neighbors(late):  # all that its neighbors' shares allow the server to take off
        key = keys.pair_mask_key(private, federation.adverts[peer].mask_key, federation.session, late, peer)
        masking.add_keystream(rings, key, -masking.pair_sign(late, peer))
    large = rings[sorted(inputs[late]).index("small")]
    assert uniform(large - as_rings(inputs[late])[sorted(inputs[late]).index("small")])


def test_no_client_gives_out_both_shares_of_another(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    inputs = inputs_of(federation.names)
    federation.run(inputs, {"masked": [federation.names[0]]})
    for given in federation.revealed.values():
        assert given.keys() == set(federation.names)
        for owner, shares in given.items():
            assert shares.keys() == ({"mask"} if owner == federation.names[0] else {"self"})
    with pytest.raises(SecureError, match="signed another list"):
        federation.confirm(federation.names[2], federation.names[2:])
    other = [name for name in federation.names if name != federation.names[1]]
    with pytest.raises(SecureError, match="signed another list"):
        federation.confirm(federation.names[2], other)


def test_fewer_shares_than_the_threshold_open_nothing(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    inputs = inputs_of(federation.names)
    federation.run(inputs)
    few = dict(list(federation.revealed.items())[: federation.session.threshold - 1])
    with pytest.raises(SecureError, match="nothing is opened"):
        federation.summed().open(few)
    with federation.stores["c000"].opened(federation.session) as state:
        secret = int(state.self_seed, 16)
    points = [shamirs.share(i + 1, int(few[name]["c000"]["self"], 16), PRIME) for i, name in enumerate(few)]
    guesses = {  # one more share of any value leads anywhere: the ones that are there do not narrow it down
        shamirs.interpolate([*points, shamirs.share(6, value, PRIME)]) for value in range(50)
    }
    assert len(guesses) == 50
    assert secret not in guesses


def test_a_session_hides_one_input(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    inputs = inputs_of(federation.names)
    federation.run(inputs)
    with pytest.raises(SecureError, match="has already masked an input"):
        federation.mask("c000", federation.sharers, inputs["c001"])


def test_an_older_session_is_over(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    inputs = inputs_of(federation.names)
    federation.run(inputs)
    old, signatures = federation.session, federation.signatures
    federation.session = new_session(federation.names)
    federation.run(inputs)
    federation.session = old
    with pytest.raises(SecureError, match="is over"):
        federation.reveal("c000", signatures)
    with pytest.raises(SecureError, match="is over"):
        federation.mask("c000", federation.sharers, inputs["c000"])


def test_messages_of_another_session_are_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    federation.run(inputs_of(federation.names))
    adverts, sealed = federation.adverts, federation.sealed
    federation.session = new_session(federation.names)
    fresh = federation.advertise(federation.names)
    with pytest.raises(SecureError, match="not signed by that client"):
        federation.share("c000", adverts)
    for name in federation.names:
        federation.share(name, fresh)
    assert federation.receive("c000", sealed) == ["c001", "c002"]


def test_a_new_session_removes_what_a_killed_process_left_of_an_older_one(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "client")
    for left in ("ab12.json", "cd34.json.partial"):
        (store.folder / left).parent.mkdir(parents=True, exist_ok=True)
        (store.folder / left).write_text("a secret")
    session = new_session(["c000", "c001", "c002"])
    client.advertise(session, "c000", make_credentials(["c000", "c001", "c002"])["c000"], store)
    assert sorted(file.name for file in store.folder.iterdir()) == sorted([f"{session.digest.hex()}.json", "records"])
    assert not any("a secret" in file.read_text() for file in store.folder.rglob("*") if file.is_file())


def test_forged_keys_are_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    adverts = federation.advertise(federation.names)
    mallory = make_credentials(federation.names)
    store = SessionStore(tmp_path / "mallory")
    forged = client.advertise(federation.session, "c001", replace(mallory["c001"], min_group=2), store)
    changed = replace(adverts["c001"], mask_key=adverts["c002"].mask_key)
    assert federation.share("c000", {**adverts, "c001": forged}).keys() == {"c002"}
    assert federation.share("c002", {**adverts, "c001": changed}).keys() == {"c000"}
    with pytest.raises(SecureError, match="keys differ from those sent before"):
        federation.share("c000", adverts)
    with pytest.raises(SecureError, match="'c000' are not signed by that client"):
        federation.share("c002", {**adverts, "c000": forged, "c001": changed})


def test_a_session_that_differs_between_clients_is_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4)
    session = federation.session
    federation.session = replace(session, bits=32)
    others = federation.advertise(federation.names[1:])
    federation.session = session
    mine = federation.advertise(["c000"])
    with pytest.raises(SecureError, match="not signed by that client"):
        federation.share("c000", {**others, **mine})


def test_changed_shares_are_not_read(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    adverts = federation.advertise(federation.names)
    sealed = {name: federation.share(name, adverts) for name in federation.names}
    text = sealed["c001"]["c000"]
    sealed["c001"]["c000"] = ("0" if text[0] != "0" else "1") + text[1:]
    sealed["c002"]["c001"] = sealed["c002"]["c000"]  # meant for another
    assert [federation.receive(name, sealed) for name in federation.names] == [["c001"], ["c002"], []]
    with pytest.raises(SecureError, match="shares differ from those sent before"):
        federation.receive("c000", {**sealed, "c001": {"c000": text}})


def test_survivors_that_did_not_sign_open_nothing(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    inputs = inputs_of(federation.names)
    adverts = federation.advertise(federation.names)
    sealed = {name: federation.share(name, adverts) for name in federation.names}
    for name in federation.names:
        federation.receive(name, sealed)
        federation.mask(name, federation.names, inputs[name])
    with pytest.raises(SecureError, match="nothing was confirmed"):
        federation.reveal("c000", {})
    five = federation.names[:5]
    signatures = {name: federation.confirm(name, federation.names if name == "c004" else five) for name in five}
    with pytest.raises(SecureError, match="'c004' did not sign this list"):
        federation.reveal("c000", signatures)
    few = {name: signatures[name] for name in five[: federation.session.threshold - 1]}
    with pytest.raises(SecureError, match="3 clients signed the list, 4 must"):
        federation.reveal("c000", few)
    with pytest.raises(SecureError, match="too small to be opened"):
        federation.confirm("c005", ["c000", "c001", "c005"])


def test_wrong_shares_are_noticed(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    federation.run(inputs_of(federation.names))
    for holder in ("c000", "c002"):
        federation.revealed[holder]["c001"]["self"] = f"{12345:034x}"
    with pytest.raises(SecureError, match="'c001' do not fit together"):
        federation.summed().open(federation.revealed)


def test_whoever_is_not_on_the_signed_roster_is_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    mine = federation.credentials["c000"]
    store = federation.stores["c000"]
    with pytest.raises(SecureError, match="'zed' is not on the roster"):
        client.advertise(new_session([*federation.names, "zed"]), "c000", mine, store)
    forged = json.dumps({"clients": {**json.loads(mine.roster)["clients"], "zed": "00" * 32}}).encode()
    with pytest.raises(SecureError, match="not signed by the operator"):
        client.advertise(new_session([*federation.names, "zed"]), "c000", replace(mine, roster=forged), store)
    with pytest.raises(SecureError, match="3 or more must take part"):
        client.advertise(new_session(["c000", "c001"]), "c000", replace(mine, min_group=3), store)


@pytest.mark.parametrize(
    "change", [{"clients": ("b", "a")}, {"clients": ("a", "a")}, {"clients": ("a",)}, {"bits": 64.0}, {"bits": 65}]
)
def test_a_session_that_protects_nobody_is_refused(change: dict[str, Any]) -> None:
    facts = asdict(Session("x", tuple("abcdef")))
    with pytest.raises(SecureError):
        Session(**{**facts, **change})


def test_keys_and_shares_of_another_form_are_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    federation.run(inputs_of(federation.names))
    session = federation.session
    facts = asdict(federation.adverts["c000"])
    assert asdict(keys.Advert(**Advert(**facts).model_dump())) == facts
    short, upper = facts["mask_key"][2:], facts["mask_key"][:-1] + "A"
    for wrong in ({}, {**facts, "more": ""}, *({**facts, "mask_key": value} for value in (1, short, upper))):
        with pytest.raises(ValidationError):
            Advert.model_validate(wrong)

    sealed, revealed = federation.sealed["c000"], federation.revealed["c000"]
    shares, opened = Shares(stage=0, session=session, adverts={}, hashes={}), Open(stage=0, session=session, signatures={})
    shares.check_reply(Ciphertexts(sealed_shares=sealed))
    opened.check_reply(Revealed.model_validate({"shares": revealed}))
    with pytest.raises(WireError, match="to clients that are not asked"):
        shares.check_reply(Ciphertexts(sealed_shares={**sealed, "zed": sealed["c001"]}))
    with pytest.raises(WireError, match="of clients that were not asked"):
        opened.check_reply(Revealed.model_validate({"shares": {**revealed, "zed": revealed["c001"]}}))
    share = revealed["c001"]["self"]
    for value in (1, "00", "zz" * sharing.SHARE_BYTES):
        with pytest.raises(ValidationError):
            Ciphertexts.model_validate({"sealed_shares": {**sealed, "c001": value}})
    for one in (share, {}, {"other": share}, {"self": share, "mask": share}, {"self": share[2:]}):
        with pytest.raises(ValidationError):
            Revealed.model_validate({"shares": {**revealed, "c001": one}})


def _same(names: list[str]) -> dict[str, Any]:
    return {name: dict(ADVERT) for name in names}


KEY, LONG = "00" * 32, [f"c{i:05d}" for i in range(10_001)]
CLIENTS = {"name": "s", "clients": ["ash", "birch", "cedar"], "bits": 64, "request": ""}
ADVERT = {"mask_key": KEY, "channel_key": KEY, "commitment": KEY, "signature": 2 * KEY}
PHASES: dict[str, dict[str, Any]] = {
    "keys": {},
    "shares": {"adverts": {"birch": ADVERT}, "hashes": {"ash": KEY, "birch": KEY}},
    "received": {"sealed_shares": {"birch": "00" * 50}},
    "check": {"survivors": ["ash", "birch"]},
    "open": {"signatures": {"ash": 2 * KEY}},
}
LIES: list[tuple[str, str, Any]] = [
    *[("keys", "session.name", name) for name in ("", "a/b", "x" * 65, 1, "é")],
    *[("keys", "session.clients", names) for names in (LONG, ["../x"], ["a b"], ["x" * 65], [1, 2], "ash", None, [["ash"]])],
    *[("keys", "session.bits", bits) for bits in (7, 65, 64.5, True, "64", 2**63, None)],
    *[("keys", "session.request", digest) for digest in ("0" * 63, "0" * 65, "g" * 64, None)],
    *[("shares", "adverts", {name: ADVERT}) for name in ("zed", "", "../x", "x" * 10**6)],
    *[("shares", "adverts", {"birch": {**ADVERT, field: value}}) for field in ADVERT for value in ("0" * 10**6, "zz" * 32, 1)],
    ("shares", "adverts", {"birch": {**ADVERT, "more": ""}}),
    ("shares", "adverts", {"birch": {}}),
    ("shares", "adverts", _same(LONG)),
    *[("shares", "hashes", {"ash": value}) for value in (KEY[2:], KEY + "00", "Z" * 64, 1, None)],
    *[("shares", "hashes", {name: KEY}) for name in ("zed", "")],
    ("shares", "hashes", dict.fromkeys(LONG, KEY)),
    *[("received", "sealed_shares", {"birch": value}) for value in ("", "00" * 49, "00" * 51, "zz" * 50, 1)],
    *[("received", "sealed_shares", {name: "00" * 50}) for name in ("zed", "x" * 10**6)],
    *[("check", "survivors", names) for names in (LONG, ["zed"], ["ash", "ash"], [1], "ash", None, ["ash", ["birch"]])],
    *[("open", "signatures", {"ash": value}) for value in ("00" * 63, "00" * 65, "zz" * 64, 1)],
    ("open", "signatures", {"zed": 2 * KEY}),
    ("open", "signatures", dict.fromkeys(LONG, 2 * KEY)),
]


@pytest.mark.parametrize(("phase", "field", "lie"), LIES, ids=lambda value: repr(value)[:20])
def test_every_field_of_a_secure_sums_messages_has_bounds(phase: str, field: str, lie: Any) -> None:
    fields: dict[str, Any] = {"stage": 0, "session": dict(CLIENTS), **PHASES[phase]}
    assert parse(f"rounds/secagg/{phase}", fields).model_dump(mode="json") == {"round": 0, **fields}
    *path, last = field.split(".")
    (fields[path[0]] if path else fields)[last] = lie
    since = time.monotonic()
    with pytest.raises((RequestError, SecureError)) as error:
        parse(f"rounds/secagg/{phase}", fields)
    assert time.monotonic() - since < 1
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("peers", [LONG, ["zed"], ["birch", "birch"], [1], None, "birch"], ids=lambda peers: repr(peers)[:20])
def test_what_masks_a_response_has_bounds(peers: Any) -> None:
    request = {"stage": 0, "part": 0}

    def message(masking: Any) -> bytes:
        return wire.pack({}, {"request": request, "masking": masking})

    masking = read("tune/base", message({"session": CLIENTS, "peers": ["birch"]}))[2]
    assert isinstance(masking, Part)
    with pytest.raises(RequestError, match="masking"):
        read("tune/base", message({"session": CLIENTS, "peers": peers}))


@pytest.mark.parametrize(
    ("reply", "fields"),
    [
        (Ciphertexts, {"sealed_shares": dict.fromkeys(LONG, "00" * 50)}),
        (Ciphertexts, {"sealed_shares": {"../x": "00" * 50}}),
        (Unreadable, {"unreadable": LONG}),
        (Unreadable, {"unreadable": ["ash"] * 2}),
        (Revealed, {"shares": {name: {"self": "00" * 17} for name in LONG}}),
        (Revealed, {"shares": {"x" * 65: {"self": "00" * 17}}}),
    ],
)
def test_what_clients_send_of_a_secure_sum_has_bounds_at_the_server(reply: type[Reply], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        reply.model_validate(fields)


@pytest.mark.parametrize("phase", PHASES)
def test_the_largest_session_is_handled_in_bounded_time(tmp_path: Path, phase: str) -> None:
    """Ten thousand clients, of which a site knows none: whatever the server sends is refused within a second or two."""
    names = ["ash", *LONG[:9999]]
    more: dict[str, dict[str, Any]] = {
        "shares": {"adverts": _same(names), "hashes": dict.fromkeys(names, KEY)},
        "received": {"sealed_shares": dict.fromkeys(names, "00" * 50)},
        "check": {"survivors": names},
        "open": {"signatures": dict.fromkeys(names, 2 * KEY)},
    }
    request = {"stage": 0, "session": {**CLIENTS, "clients": names}, **more.get(phase, {})}
    kind = f"rounds/secagg/{phase}"
    client = LocalClient("ash", tmp_path, tmp_path, None, (), None, {}, keys.make_credentials(["ash", "birch"])["ash"])
    message = wire.pack({}, {"request": request})
    since = time.monotonic()
    with pytest.raises(SecureError):
        serve(kind, message, client, "cpu")
    assert time.monotonic() - since < 5


def test_the_page_on_security_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_[a-z_]+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")))
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)
    }
    assert len(named) > 20
    assert named <= defined


def test_every_row_of_the_page_on_security_names_a_test_or_an_assumption() -> None:
    rows = [line for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not re.match(r"\| `\w+/\w+", row)]  # the first table is made from the request types
    heads = ("| request |", "| attack |", "| promise |", "| aggregation |", "| who |")
    without = [row for row in promises if not row.startswith(heads) and not re.search(r"`test_|assumption|the same \|", row)]
    assert len(promises) > 50
    assert not without
