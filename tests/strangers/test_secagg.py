"""Secure aggregation against a server that lies, and against clients that do: many members of each kind of lie."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from fedgrove.client.local_client import LocalClient
from fedgrove.client.serve import serve
from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.exchange import Noise
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.secagg import client, keys, masking
from fedgrove.privacy.secagg.keys import make_credentials
from fedgrove.privacy.secagg.masking import as_rings
from fedgrove.privacy.secagg.server import Opening
from fedgrove.privacy.secagg.session import OtherSurvivors, SecureError, Session, min_survivors, new_session, parameters
from fedgrove.privacy.secagg.store import SessionStore
from fedgrove.rounds import wire
from fedgrove.rounds.exchanges.secagg import Masking
from fedgrove.rounds.request import Request, RequestError, Tensors, parse
from fedgrove.stages.prune.fixed_weights import FixedWeights
from fedgrove.stages.tune.aggregation import ffa_lora
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.client_model import TuneRequest, digest_of_base
from fedgrove.stages.tune.exchanges.base import KeepWeights
from fedgrove.stages.tune.exchanges.train import Train, start_tensors
from fedgrove.stages.tune.factors import Factors
from fedgrove.stages.tune.fixed_point import ClientNoise, FixedPointChanges
from fedgrove.stages.tune.train_settings import WindowNoise
from secagg import Federation, inputs_of, same, total
from small import LENGTH, Small
from test_requests import EXCHANGES


def opened_part(federation: Federation, group: Sequence[str], masked: Mapping[str, Tensors], revealed: Any) -> Tensors | None:
    """What a server learns of a part of the survivors: its sum without the masks whose secrets it can recover.

    Returns:
        None: a self-mask of the group cannot be recovered.
    """
    session = federation.session
    opening = Opening(session, federation.adverts, federation.sharers)
    for name in group:
        opening.add(name, masked[name])
    try:
        seeds = {name: opening.secret(name, "self", revealed) for name in group}
    except SecureError:
        return None
    rings = as_rings(opening._sum)
    for seed in seeds.values():
        masking.add_keystream(rings, keys.self_mask_key(seed, session), -1)
    for other in sorted(set(federation.names) - set(group)):
        try:
            private = keys.session_key(opening.secret(other, "mask", revealed), "mask", session)
        except SecureError:
            continue
        for name in set(group) & set(session.neighbors(other)):
            key = keys.pair_mask_key(private, federation.adverts[name].mask_key, session, other, name)
            masking.add_keystream(rings, key, -masking.pair_sign(name, other))
    masking.reduce(rings, session)
    masking.restore_signs(rings, session)
    return opening._sum


# The parameters of a sum


@pytest.mark.parametrize("number", [*range(2, 60), 64, 65, 99, 100, 127, 128, 129, 200, 333, 500, 1000, 1025])
def test_the_number_of_clients_alone_decides_who_is_protected_from_whom(number: int) -> None:
    degree, threshold, quorum = parameters(number)
    assert 0 < degree < number
    assert degree % 2 == 0 or degree == number - 1
    assert 2 * threshold > degree + 1, "two lists of survivors could both be signed"
    assert threshold <= degree + 1
    assert 3 * quorum >= 2 * number
    assert 2 * quorum > number
    assert quorum == min_survivors(number)
    if degree == number - 1:
        colluding = (number - 1) // 3
        assert 2 * threshold > number + colluding, "colluding clients sign both lists"
        assert 2 * (threshold - 1 - colluding) >= number - colluding - 1 or number < 4, "honest survivors fall into parts"
    else:
        assert threshold >= degree // 2 + 2, "the survivors of a ring of neighbors could fall into parts"
    session = Session("x", tuple(f"c{i:04d}" for i in range(number)))
    assert (session.degree, session.threshold, session.quorum) == (degree, threshold, quorum)
    assert asdict(session).keys() == {"name", "clients", "bits", "request"}


@pytest.mark.parametrize("key", ["degree", "threshold", "quorum", "neighbors", "min_group"])
@pytest.mark.parametrize("number", [2, 3, 6, 9, 50, 101])
@pytest.mark.parametrize("kind", ["keys", "shares", "received", "check", "open"])
def test_a_request_that_names_a_parameter_is_refused(kind: str, number: int, key: str) -> None:
    more = {"shares": {"adverts": {}, "hashes": {}}, "received": {"sealed_shares": {}}, "check": {"survivors": []}}
    more["open"] = {"signatures": {}}
    session = {"name": "x", "clients": [f"c{i:03d}" for i in range(number)], "bits": 64}
    for value in (*range(1, number), getattr(parameters(number), key, 2)):
        with pytest.raises(RequestError, match=f"session.{key}"):
            parse(f"rounds/secagg/{kind}", {"stage": 0, "session": {**session, key: value}, **more.get(kind, {})})


@pytest.mark.parametrize("number", [6, 9, 12])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_part_of_the_survivors_is_opened_if_every_third_client_falls_silent(tmp_path: Path, number: int, size: int) -> None:
    federation = Federation(tmp_path, number)
    inputs = inputs_of(federation.names)
    ring = sorted(federation.names)
    survivors, opened = federation.run(inputs, {"masked": ring[0::3]})
    assert same(opened, total(inputs, survivors))
    for at in range(len(survivors)):
        group = [survivors[(at + i) % len(survivors)] for i in range(size)]
        part = opened_part(federation, group, federation.masked, federation.revealed)
        assert part is None or not same({"large": part["large"]}, {"large": total(inputs, group)["large"]})


def test_the_helper_of_these_tests_opens_what_can_be_opened(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    inputs = inputs_of(federation.names)
    survivors, _ = federation.run(inputs, {"masked": federation.names[:1]})
    part = opened_part(federation, survivors, federation.masked, federation.revealed)
    assert part is not None
    assert same(part, total(inputs, survivors))


# What an earlier beginning of a session leaves behind


class Replayed:
    """The same clients twice in the same session, with other secrets: as if all had lost their disks, or in a second run."""

    def __init__(self, folder: Path, number: int):
        self.first = Federation(folder / "first", number)
        self.again = Federation(folder / "again", number)
        self.again.credentials, self.again.session = self.first.credentials, self.first.session
        self.names = self.first.names
        self.inputs = inputs_of(self.names)


@pytest.mark.parametrize("number", [3, 6, 12])
def test_signatures_of_an_earlier_beginning_open_nothing(tmp_path: Path, number: int) -> None:
    both = Replayed(tmp_path, number)
    few = both.names[: number - number // 3]
    both.first.run(both.inputs, {"masked": both.names[len(few) :]})
    again = both.again
    adverts = again.advertise(again.names)
    sealed = {name: again.share(name, adverts) for name in again.names}
    for name in again.names:
        again.receive(name, sealed)
        again.mask(name, again.names, both.inputs[name])
    for name in few:
        again.confirm(name, few)
        with pytest.raises(SecureError, match="did not sign this list of survivors"):
            again.reveal(name, both.first.signatures)


@pytest.mark.parametrize("old", ["one peer's", "all peers'", "its own and theirs"])
def test_keys_of_an_earlier_beginning_lead_nowhere(tmp_path: Path, old: str) -> None:
    """A client may be shown old keys, for they are signed; but then nobody else signs what it signs."""
    both = Replayed(tmp_path, 6)
    both.first.run(both.inputs)
    again, me = both.again, "c000"
    fresh = again.advertise(again.names)
    replayed = {"one peer's": ["c001"], "its own and theirs": again.names}.get(old, again.names[1:])
    shown = {**fresh, **{name: both.first.adverts[name] for name in replayed}}
    if me in replayed:
        with pytest.raises(SecureError, match="are not those that its clients sent"):
            again.share(me, shown)
        return
    mine = {me: again.share(me, shown)}
    others = {name: again.share(name, fresh) for name in again.names[1:]}
    old_or_fresh = both.first.sealed if old == "all peers'" else others
    assert again.receive(me, {**old_or_fresh, **mine}) == again.names[1:], "they are for other keys, or for other hashes"


@pytest.mark.parametrize("wrong", ["own", "neighbor", "missing", "stranger", "more neighbors"])
def test_hashes_that_are_not_those_of_the_keys_are_refused(tmp_path: Path, wrong: str) -> None:
    federation = Federation(tmp_path, 4)
    adverts = federation.advertise(federation.names)
    hashes = {name: keys.advert_hash(name, advert) for name, advert in adverts.items()}
    shown = {name: adverts[name] for name in federation.names[1:]}
    if wrong == "own":
        hashes["c000"] = hashes["c001"]
    elif wrong == "neighbor":
        hashes["c002"] = hashes["c001"]
    elif wrong == "missing":
        del hashes["c003"]
    elif wrong == "stranger":
        hashes["zed"] = hashes["c001"]
    else:
        del shown["c003"]
    with pytest.raises(SecureError, match="are not those that its clients sent"):
        client.share(federation.session, "c000", federation.credentials["c000"], federation.stores["c000"], shown, hashes)


def test_a_client_that_is_no_neighbor_is_bound_to_the_same_keys(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 60)
    session, me = federation.session, "c000"
    far = next(name for name in federation.names[1:] if name not in session.neighbors(me))
    adverts = federation.advertise(federation.names)
    shown = {name: adverts[name] for name in session.neighbors(me)}
    hashes = {name: keys.advert_hash(name, advert) for name, advert in adverts.items()}
    assert keys.adverts_digest(session, hashes) != keys.adverts_digest(session, {**hashes, far: hashes[me]})
    client.share(session, me, federation.credentials[me], federation.stores[me], shown, hashes)
    with pytest.raises(SecureError, match="differ from those sent before"):
        client.share(session, me, federation.credentials[me], federation.stores[me], shown, {**hashes, far: hashes[me]})


@pytest.mark.parametrize("between", [1, 3])
def test_a_session_is_begun_once(tmp_path: Path, between: int) -> None:
    federation = Federation(tmp_path, 3)
    sessions = [federation.session, *(new_session(federation.names) for _ in range(between))]
    for session in sessions:
        federation.session = session
        federation.advertise(federation.names)
        federation.advertise(federation.names)  # a repeated request
    for session in sessions[:-1]:
        federation.session = session
        federation.stores = {name: SessionStore(store.folder) for name, store in federation.stores.items()}  # a new process
        with pytest.raises(SecureError, match="began this session before"):
            federation.advertise(federation.names)


def test_a_session_that_was_interrupted_before_anything_was_sent_begins(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    store = federation.stores["c000"]
    store.folder.mkdir()
    (store.folder / f"{federation.session.digest.hex()}.json.partial").write_text("half a state")
    inputs = inputs_of(federation.names)
    assert same(federation.run(inputs)[1], total(inputs, federation.names))


# Bad ciphertexts and bad shares


def spoiled(text: str, how: str) -> str:
    flipped = f"{int(text[0], 16) ^ 1:x}"
    return {
        "first digit": flipped + text[1:],
        "last digit": text[:-1] + f"{int(text[-1], 16) ^ 1:x}",
        "zeros": "0" * len(text),
        "short": text[:-2],
        "empty": "",
        "no hex": "zz" + text[2:],
    }[how]


@pytest.mark.parametrize("how", ["first digit", "last digit", "zeros", "short", "empty", "no hex"])
@pytest.mark.parametrize(("number", "bad"), [(3, 1), (9, 1), (9, 3), (9, 8), (12, 4)])
def test_a_ciphertext_that_cannot_be_read_costs_one_share_and_no_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, bad: int, how: str
) -> None:
    """One client sends unreadable shares to some: it stays while enough can read theirs, and else it alone is left out."""
    federation, sender = Federation(tmp_path, number), "c001"
    inputs = inputs_of(federation.names)
    honest = federation.share

    def share(name: str, adverts: Mapping[str, keys.Advert]) -> dict[str, str]:
        sealed = honest(name, adverts)
        if name != sender:
            return sealed
        return {peer: spoiled(text, how) if i < bad else text for i, (peer, text) in enumerate(sealed.items())}

    monkeypatch.setattr(federation, "share", share)
    survivors, opened = federation.run(inputs)
    stays = number - bad >= federation.session.threshold
    assert survivors == [name for name in federation.names if stays or name != sender]
    assert same(opened, total(inputs, survivors))


@pytest.mark.parametrize(
    "how", ["unsigned", "another's signature", "zero mask key", "zero channel key", "point of small order"]
)
@pytest.mark.parametrize("number", [3, 9])
def test_a_client_whose_keys_are_invalid_is_left_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, how: str
) -> None:
    federation, bad = Federation(tmp_path, number), "c001"
    inputs = inputs_of(federation.names)
    advertise, share, receive = federation.advertise, federation.share, federation.receive

    def advertise_badly(names: Sequence[str]) -> dict[str, keys.Advert]:
        adverts = advertise(names)
        change = {
            "unsigned": {"signature": "00" * 64},
            "another's signature": {"signature": adverts["c000"].signature},
            "zero mask key": {"mask_key": "00" * 32},
            "zero channel key": {"channel_key": "00" * 32},
            "point of small order": {"mask_key": "01" + "00" * 31},
        }[how]
        changed = replace(adverts[bad], **change)
        if "signature" not in change:  # the client itself signs such keys
            message = keys.advert_message(federation.session, bad, changed)
            changed = replace(changed, signature=keys.sign(federation.credentials[bad].key, message))
        return {**adverts, bad: changed}

    monkeypatch.setattr(federation, "advertise", advertise_badly)
    monkeypatch.setattr(federation, "share", lambda name, adverts: {} if name == bad else share(name, adverts))
    monkeypatch.setattr(federation, "receive", lambda name, sealed: [] if name == bad else receive(name, sealed))
    survivors, opened = federation.run(inputs)
    assert survivors == [name for name in federation.names if name != bad]
    assert same(opened, total(inputs, survivors))


@pytest.mark.parametrize("number", [3, 9, 12])
def test_a_client_that_claims_to_read_no_shares_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    federation, liar = Federation(tmp_path, number), "c001"
    inputs = inputs_of(federation.names)
    honest = federation.receive

    def receive(name: str, sealed: Mapping[str, Mapping[str, str]]) -> list[str]:
        unreadable = honest(name, sealed)
        return [peer for peer in federation.names if peer != name] if name == liar else unreadable

    monkeypatch.setattr(federation, "receive", receive)
    survivors, opened = federation.run(inputs)
    assert survivors == federation.names
    assert same(opened, total(inputs, survivors))


@pytest.mark.parametrize("number", [6, 9, 12, 15])
def test_a_graph_of_masks_that_the_server_chooses_opens_no_part(tmp_path: Path, number: int) -> None:
    """It lets the survivors of each half share masks with each other and with clients that drop out, and with nobody else."""
    federation = Federation(tmp_path, number)
    inputs, session = inputs_of(federation.names), federation.session
    federation.adverts = federation.advertise(federation.names)
    federation.sealed = {name: federation.share(name, federation.adverts) for name in federation.names}
    dropped = federation.names[: number - session.quorum]
    rest = federation.names[len(dropped) :]
    halves = [rest[: len(rest) // 2], rest[len(rest) // 2 :]]
    federation.sharers = federation.names
    for name in federation.names:
        assert federation.receive(name, federation.sealed) == []
    masked = {}
    for half in halves:
        for name in half:
            masked[name] = federation.mask(name, [*dropped, *half], inputs[name])
    signatures = {name: federation.confirm(name, rest) for name in rest}
    revealed = {name: federation.reveal(name, signatures) for name in rest}
    for half in halves:
        assert opened_part(federation, half, masked, revealed) is None


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Federation, list[str]]]:
    """A sum of so many clients up to the shares that they reveal, and its survivors; made once."""

    @cache
    def run(number: int) -> tuple[Federation, list[str]]:
        federation = Federation(tmp_path_factory.mktemp(f"honest-{number}"), number)
        gone = federation.names[-1:] if number > 6 else []
        survivors, _ = federation.run(inputs_of(federation.names), {"masked": gone})
        return federation, survivors

    return run


@pytest.mark.parametrize(
    ("number", "value"),
    [
        *itertools.product([3, 4, 6, 9, 12, 16], ["random", "zero", "largest", "another's"]),
        (50, "another's"),  # so many that nobody has shares of all
    ],
)
def test_wrong_shares_are_left_out_and_their_holders_named(
    honest: Callable[[int], tuple[Federation, list[str]]], number: int, value: str
) -> None:
    federation, survivors = honest(number)
    revealed = copy.deepcopy(federation.revealed)
    liars = survivors[:1] if number < 9 else survivors[:2]
    for liar in liars:
        for owner, shares in revealed[liar].items():
            for which in shares:
                other = revealed[survivors[-1]].get(owner, {}).get(which, "0")
                lie = {"random": f"{12345 + len(owner):034x}", "zero": "0" * 34, "largest": "f" * 34, "another's": other}
                shares[which] = lie[value]
    opening = federation.summed()
    assert same(opening.open(revealed), total(inputs_of(federation.names), survivors))
    assert opening.liars == set(liars)


@pytest.mark.parametrize("number", [3, 6, 9])
def test_too_many_wrong_shares_are_one_line(tmp_path: Path, number: int) -> None:
    federation = Federation(tmp_path, number)
    federation.run(inputs_of(federation.names))
    for liar in federation.names[: number - federation.session.threshold + 1]:
        federation.revealed[liar]["c001"]["self"] = f"{12345:034x}"
    with pytest.raises(
        SecureError, match=r"the shares of client 'c001' do not fit together: .*; leave out 'c001', or run again"
    ):
        federation.summed().open(federation.revealed)


# Different requests to different clients

SUMMED = [exchange.request for exchange in EXCHANGES if exchange.request.OWN_FIELDS is not None]
UNSUMMED = [exchange.request for exchange in EXCHANGES if exchange.request.OWN_FIELDS is None]
OTHER = {  # of fields with a list of allowed values
    "adamw": "sgd", "mean": "each", "lora": "full", "full": "ia3", "ia3": "full", "float32": "bfloat16",
}  # fmt: skip
OF_CLIENTS = ClientNoise(epsilon=1.0, delta=0.05, clip=1.0, rounds=2, adders=2)
FIXED = FixedPointChanges(everything=198, most=999, widest={"x": 4}, noise=OF_CLIENTS)
NOISE = Noise(norms={"x": 1.0}, inputs=1, skips_first=False, clients=2, epsilon=1.0, delta=0.05)
WINDOWS = WindowNoise(epsilon=1.0, delta=0.05, noise=1.0, rounds=1, clip=1.0)
CODE = FixedWeights(units={"x": 1.0}, clients=3)
for summed in list(SUMMED):
    noise = OF_CLIENTS if "ClientNoise" in str(type(summed).model_fields.get("noise")) else NOISE
    for part in ({"fixed": FIXED}, {"noise": noise}, {"windows": WINDOWS}, {"fixed_point": CODE}, {"held": 4}):
        if part.keys() <= type(summed).model_fields.keys():
            SUMMED.append(summed.model_copy(update=part))


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all plain values in JSON."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    elif value is not None and not isinstance(value, dict | list):
        yield path


def changed(value: Any, path: tuple[str | int, ...]) -> Any:
    """The same value with another one at a path, whether or not its type allows it."""
    if not path:
        if isinstance(value, bool):
            return not value
        return value + 1 if isinstance(value, int | float) else OTHER.get(value, f"{value}x")
    key, *rest = path
    if isinstance(value, BaseModel):
        return value.model_copy(update={str(key): changed(getattr(value, str(key)), tuple(rest))})
    if isinstance(value, dict):
        return {**value, key: changed(value[key], tuple(rest))}
    return tuple(changed(one, tuple(rest)) if number == key else one for number, one in enumerate(value))


def is_own(request: Request, path: tuple[str | int, ...]) -> bool:
    names = ".".join(str(key) for key in path)
    assert request.OWN_FIELDS is not None
    return any(f"{names}.".startswith(f"{own}.") for own in request.OWN_FIELDS)


@pytest.mark.parametrize("request_", SUMMED, ids=lambda request: request.KIND)
def test_every_field_is_the_same_for_all_clients_of_a_sum_or_is_listed_as_the_clients_own(request_: Request) -> None:
    tensors = {"own/x/b": torch.ones(3, 2)}
    digest = request_.sum_digest(tensors)
    paths = list(leaves(request_.model_dump(mode="json")))
    assert len(paths) > 3
    for path in paths:
        assert (changed(request_, path).sum_digest(tensors) == digest) is is_own(request_, path), path
    assert request_.sum_digest({}) != digest
    assert request_.sum_digest({"own/x/b": torch.zeros(3, 2)}) != digest
    assert request_.sum_digest({"own/x/b": torch.ones(2, 3)}) != digest
    assert request_.sum_digest({"own/x/b": torch.ones(3, 2, dtype=torch.float64)}) != digest
    assert request_.sum_digest({"own/y/b": torch.ones(3, 2)}) != digest
    assert request_.sum_digest({**tensors, "own/y/b": torch.ones(1, 2)}) != digest


def test_fields_that_are_listed_as_the_clients_own_exist() -> None:
    for request_ in {type(one): one for one in SUMMED}.values():
        every = [one for one in SUMMED if type(one) is type(request_)]
        seen = {path for one in every for path in leaves(one.model_dump(mode="json"))}
        assert request_.OWN_FIELDS is not None
        for own in request_.OWN_FIELDS:
            assert any(f"{'.'.join(map(str, path))}.".startswith(f"{own}.") for path in seen), own


def client_with_credentials(folder: Path) -> LocalClient:
    names = ["ash", "birch", "cedar"]
    return LocalClient("ash", folder, folder, None, (), None, {}, make_credentials(names)["ash"])


def masked_message(request: Request, tensors: Tensors, digest: str) -> bytes:
    """A request to mask the response in a session whose clients agreed on a request with this digest."""
    session = new_session(["ash", "birch", "cedar"], request=digest)
    masking = Masking(session=session, peers=["birch", "cedar"])
    return wire.pack(tensors, {"request": request.model_dump(mode="json"), "masking": masking.model_dump(mode="json")})


@pytest.mark.parametrize("request_", SUMMED, ids=lambda request: request.KIND)
def test_a_client_computes_nothing_for_a_request_that_others_did_not_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: Request
) -> None:
    ash = client_with_credentials(tmp_path)
    monkeypatch.setattr(type(request_), "respond", lambda *rest: pytest.fail("it computed a response"))
    tensors = {"own/x/b": torch.ones(3, 2)}
    path = next(path for path in leaves(request_.model_dump(mode="json")) if not is_own(request_, path))
    for request_of_others, sent in (
        (changed(request_, path), tensors),
        (request_, {"own/x/b": torch.zeros(3, 2)}),
        (request_, {}),
    ):
        message = masked_message(request_, tensors, request_of_others.sum_digest(sent))
        with pytest.raises(FedgroveError, match=r"'ash': this '.*' is not the request that the clients of this sum agreed on"):
            serve(request_.KIND, message, ash, "cpu")


@pytest.mark.parametrize("request_", UNSUMMED, ids=lambda request: request.KIND)
def test_what_is_not_summed_is_not_answered_as_if_it_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: Request
) -> None:
    """Losses in a reply would travel in the open beside tensors that are masked, or beside none."""
    ash = client_with_credentials(tmp_path)
    monkeypatch.setattr(type(request_), "respond", lambda *rest: pytest.fail("it computed a response"))
    message = masked_message(request_, {}, request_.sum_digest({}))
    with pytest.raises(FedgroveError, match=r"'ash': responses to '.*' are not summed"):
        serve(request_.KIND, message, ash, "cpu")


def test_a_response_without_tensors_is_not_sent(tmp_path: Path) -> None:
    session = new_session(["ash", "birch", "cedar"])
    with pytest.raises(FedgroveError, match="'ash': its response has no tensors"):
        Masking(session=session, peers=["birch", "cedar"]).apply(client_with_credentials(tmp_path), "tune/train/0/0", {})


@pytest.mark.parametrize("rank", range(6))
def test_clients_of_unequal_ranks_start_from_the_same(rank: int) -> None:
    train = next(one for one in SUMMED if type(one) is Train and one.parametrization == "lora")
    train = train.model_copy(update={"shared_a": True})
    torch.manual_seed(0)
    state = State(Factors(torch.randn(7, 5), torch.randn(5, 3)), Factors(torch.zeros(7, 0), torch.zeros(0, 3)))

    def sent(state: State[Factors], rank: int) -> Tensors:
        return start_tensors({"x": ffa_lora.begin(state, rank)}, torch.float32, shared_a=True)

    digests = [train.sum_digest(wire.unpack(wire.pack(sent(state, of), {}))[0]) for of in (rank, 5, 2)]
    assert len(set(digests)) == 1
    other = State(Factors(state.live.b * torch.tensor([1, 1, 1, 1, 0.5]), state.live.a), state.frozen)
    assert train.sum_digest(sent(other, rank)) != digests[0]


@pytest.mark.parametrize("number", [3, 6, 60])
def test_sessions_of_different_requests_are_different_sessions(tmp_path: Path, number: int) -> None:
    federation = Federation(tmp_path, number)
    named = federation.session
    few = federation.names[:1]
    federation.session = replace(named, request="what most are asked")
    adverts = federation.advertise(federation.names)
    federation.session = replace(named, request="what one is asked")
    adverts |= federation.advertise(few)
    with pytest.raises(SecureError, match="not signed by that client"):
        federation.share(few[0], adverts)


# A second sum of other clients


@pytest.mark.parametrize("number", [6, 9])
@pytest.mark.parametrize("second", ["one less", "one more", "another one"])
def test_a_second_list_of_survivors_of_the_same_sum_is_refused(tmp_path: Path, number: int, second: str) -> None:
    federation = Federation(tmp_path, number)
    inputs = inputs_of(federation.names)
    first = federation.names[:-1]
    federation.run(inputs, {"masked": federation.names[-1:]})
    others = {"one less": first[:-1], "one more": federation.names, "another one": [*first[:-1], federation.names[-1]]}[second]
    for _ in range(2):  # in every later session, also by a new process
        federation.session = new_session(federation.names)
        federation.stores = {name: SessionStore(store.folder) for name, store in federation.stores.items()}
        federation.adverts = federation.advertise(federation.names)
        federation.sealed = {name: federation.share(name, federation.adverts) for name in federation.names}
        for name in federation.names:
            federation.receive(name, federation.sealed)
            federation.mask(name, federation.names, inputs[name])
        signatures = {}
        for name in others:
            if name in first:
                with pytest.raises(OtherSurvivors, match=f"client '{name}': its response is already in a sum of other clients"):
                    federation.confirm(name, others)
                with pytest.raises(SecureError, match="nothing was confirmed"):
                    federation.reveal(name, signatures)
            else:
                signatures[name] = federation.confirm(name, others)
    federation.session = new_session(federation.names)
    assert same(federation.run(inputs, {"masked": federation.names[-1:]})[1], total(inputs, first)), "the same sum again"
    federation.session, federation.sum_name = new_session(federation.names), "another sum"
    assert same(federation.run(inputs)[1], total(inputs, federation.names))


@pytest.mark.parametrize("request_", SUMMED, ids=lambda request: request.KIND)
def test_the_name_of_a_sum_says_which_it_is_and_nothing_that_a_server_may_vary(request_: Request) -> None:
    assert set(request_.SUM_FIELDS) <= type(request_).model_fields.keys()
    for path in leaves(request_.model_dump(mode="json")):
        other = changed(request_, path)
        assert (other.sum_name != request_.sum_name) is (path[0] in request_.SUM_FIELDS)


@pytest.mark.parametrize("sent", ["other weights", "one part less", "parts in another order", "none"])
def test_a_client_trains_only_the_model_that_all_were_sent(small: Small, tmp_path: Path, sent: str) -> None:
    ash = LocalClient("ash", tmp_path, small.model, None, (small.texts["ash"],), None)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = Checkpoint(small.model).read(name)
    model = [{name: weight}, {name.replace("layers.0", "layers.1"): weight * 0.5}]
    requests = [KeepWeights(stage=1, part=part) for part in range(2)]
    digest = digest_of_base([request.sum_digest(tensors) for request, tensors in zip(requests, model, strict=True)])
    fields = {"stage": 1, "cut": None, "bits": 32, "length": LENGTH, "seed": "s", "personal": 0.0}
    train = TuneRequest(parts=2, base_digest=digest, **fields)

    def store(parts: Sequence[Tensors]) -> None:
        for request, tensors in zip(requests, parts, strict=False):
            serve(request.KIND, wire.pack(tensors, {"request": request.model_dump(mode="json")}), ash, "cpu")

    store(
        {
            "other weights": [model[0], {key: value * 2 for key, value in model[1].items()}],
            "one part less": model[:1],
            "parts in another order": model[::-1],
            "none": [],
        }[sent]
    )
    with pytest.raises(FedgroveError, match=r"client 'ash': (the model that it was sent is not|its working files are gone)"):
        train.model_and_windows(ash, "cpu")
    store(model)
    assert torch.equal(train.model_and_windows(ash, "cpu")[0].checkpoint.read(name), weight)
    with pytest.raises(FedgroveError, match="the model that it was sent is not"):
        train.model_copy(update={"base_digest": ""}).model_and_windows(ash, "cpu")
