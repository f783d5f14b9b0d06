"""Secure aggregation, and attacks on it: what the server sees, what it is refused, and what clients' drops may do."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shamirs
import torch
from fedgrove.client.handlers import HANDLERS, LocalClient, serve

from fedgrove import run as server
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.privacy import secure
from fedgrove.privacy.secure import Credentials, Opening, SecureError, Session, SessionStore, as_rings, new_session
from fedgrove.rounds import wire
from fedgrove.stages.prune.aggregation import pooled as statistics
from small import LENGTH, Small, complaint
from test_statistics import hashes, prune

PHASES = ("keys", "shares", "masked", "check", "open")


class Federation:
    """Clients with real keys on real folders, asked phase by phase; ``silent`` clients answer nothing from a phase on."""

    def __init__(self, folder: Path, number: int):
        self.names = [f"c{i:03d}" for i in range(number)]
        self.credentials = secure.make_credentials(self.names, min_group=2)
        self.memory = {name: SessionStore(folder / name) for name in self.names}
        self.session = new_session(self.names)

    def keys(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: secure.keys(self.session, name, self.credentials[name], self.memory[name]) for name in names}

    def share(self, name: str, adverts: Mapping[str, Any]) -> dict[str, Any]:
        near = {peer: adverts[peer] for peer in self.session.neighbours(name) if peer in adverts}
        return secure.share(self.session, name, self.credentials[name], self.memory[name], near)

    def mask(self, name: str, sealed: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mine = {peer: sealed[peer][name] for peer in self.session.neighbours(name) if name in sealed.get(peer, {})}
        return secure.mask(self.session, name, self.memory[name], mine, tensors)

    def confirm(self, name: str, survivors: list[str]) -> str:
        return secure.confirm(self.session, name, self.credentials[name], self.memory[name], survivors)["signature"]

    def reveal(self, name: str, signatures: Mapping[str, str]) -> dict[str, Any]:
        return secure.reveal(self.session, name, self.credentials[name], self.memory[name], signatures)

    def near(self, name: str) -> dict[str, str]:
        return {peer: self.signatures[peer] for peer in self.session.holders(name) if peer in self.signatures}

    def run(self, inputs: Mapping[str, Mapping[str, torch.Tensor]], silent: Mapping[str, Sequence[str]] | None = None) -> Any:
        """The whole protocol; gives the survivors and the opened sum."""
        gone: set[str] = set()

        def left(phase: str, names: Sequence[str]) -> list[str]:
            gone.update((silent or {}).get(phase, ()))
            return [name for name in names if name not in gone]

        self.adverts = self.keys(left("keys", self.names))
        self.sealed = {name: self.share(name, self.adverts) for name in left("shares", list(self.adverts))}
        opening = Opening(self.session, self.adverts, self.sealed)
        self.masked = {}
        for name in left("masked", list(self.sealed)):
            self.masked[name] = self.mask(name, self.sealed, inputs[name])
            opening.add(name, self.masked[name])
        self.signatures = {name: self.confirm(name, opening.survivors) for name in left("check", opening.survivors)}
        self.revealed = {name: self.reveal(name, self.near(name)) for name in left("open", list(self.signatures))}
        return opening.survivors, opening.open(self.revealed)


def inputs_of(names: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Numbers of every ring, negative ones among them."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: {
            "counts": torch.randint(0, 2, (3, 11), generator=generator, dtype=torch.uint8),
            "small": torch.randint(-(2**24), 2**24, (70_001,), generator=generator, dtype=torch.int32),
            "large": torch.randint(-(2**50), 2**50, (5, 7), generator=generator, dtype=torch.int64),
        }
        for name in names
    }


def total(inputs: Mapping[str, Mapping[str, torch.Tensor]], names: Sequence[str]) -> dict[str, torch.Tensor]:
    return {key: sum(inputs[name][key].long() for name in names) for key in inputs[names[0]]}  # type: ignore[misc]


def same(opened: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(opened[key].long(), wanted[key]) for key in wanted)


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
    early = phase in PHASES[:3]
    assert survivors == [name for name in federation.names if not early or name not in gone]
    assert same(opened, total(inputs, survivors))


def test_drops_in_every_phase_at_once(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 16)
    inputs = inputs_of(federation.names)
    survivors, opened = federation.run(inputs, dict(zip(PHASES, ([name] for name in federation.names[3::2]), strict=False)))
    assert len(survivors) == 13
    assert same(opened, total(inputs, survivors))


def test_many_clients_share_masks_with_their_neighbours_only(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 80)
    session = federation.session
    assert session.degree == 8 * math.ceil(math.log2(80)) < 79
    for name in federation.names:
        assert len(session.neighbours(name)) == session.degree
        assert all(name in session.neighbours(other) for other in session.neighbours(name))
    inputs = {name: {"x": torch.full((9,), i, dtype=torch.int32)} for i, name in enumerate(federation.names)}
    survivors, opened = federation.run(inputs, {"shares": federation.names[::9], "masked": federation.names[1::9]})
    assert 80 - len(survivors) == 18
    assert torch.equal(opened["x"], torch.full((9,), sum(int(name[1:]) for name in survivors), dtype=torch.int32))


def uniform(values: np.ndarray[Any, Any]) -> bool:
    """A χ² test of the bytes: far from uniform with probability 10⁻⁶ where they are uniform."""
    counts = np.bincount(values.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * math.sqrt(2 * 255)


def test_what_the_server_sees_cannot_be_told_from_random(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4)
    zeros = {name: {"x": torch.zeros(100_000, dtype=torch.int32)} for name in federation.names}
    federation.run(zeros)
    seen = [as_rings(federation.masked[name])[0] for name in federation.names]
    assert not uniform(as_rings(zeros[federation.names[0]])[0])
    for i, mine in enumerate(seen):
        assert uniform(mine)
        for theirs in seen[:i]:  # no two answers hold the same mask, nor opposite ones
            assert uniform(mine - theirs)
            assert uniform(mine + theirs)
    assert uniform(seen[0] + seen[1] + seen[2])  # all but one of them tell no more than each
    again = Federation(tmp_path / "again", 4)
    again.run(zeros)
    assert uniform(seen[0] - as_rings(again.masked[again.names[0]])[0])


def test_the_late_answer_of_a_dropped_client_stays_closed(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 5)
    inputs = inputs_of(federation.names)
    late = federation.names[2]
    survivors, opened = federation.run(inputs, {"masked": [late]})
    assert same(opened, total(inputs, survivors))
    answer = federation.mask(late, federation.sealed, inputs[late])  # it comes after the sum was opened
    assert all("self" not in given[late] for given in federation.revealed.values())
    rings = as_rings(answer)
    opening = Opening(federation.session, federation.adverts, federation.sealed)
    private = secure._private(opening._secret(late, "seed", federation.revealed), "mask", federation.session)
    for peer in federation.session.neighbours(late):  # all that its neighbours' shares allow the server to take off
        key = secure._pair_key(private, federation.adverts[peer]["mask"], federation.session, late, peer)
        secure.add_keystream(rings, key, -secure._sign_of(late, peer))
    large = rings[sorted(inputs[late]).index("small")]
    assert uniform(large - as_rings(inputs[late])[sorted(inputs[late]).index("small")])


def test_no_client_gives_out_both_shares_of_another(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    inputs = inputs_of(federation.names)
    federation.run(inputs, {"masked": [federation.names[0]]})
    for given in federation.revealed.values():
        assert given.keys() == set(federation.names)
        for owner, shares in given.items():
            assert shares.keys() == ({"seed"} if owner == federation.names[0] else {"self"})
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
    opening = Opening(federation.session, federation.adverts, federation.sealed)
    for name, answer in federation.masked.items():
        opening.add(name, answer)
    with pytest.raises(SecureError, match="nothing is opened"):
        opening.open(few)
    secret = int(json.loads(next((tmp_path / "c000").glob("*.json")).read_text())["self"], 16)
    points = [shamirs.share(i + 1, int(few[name]["c000"]["self"], 16), secure.PRIME) for i, name in enumerate(few)]
    guesses = {  # one more share of any value leads anywhere: the ones that are there do not narrow it down
        shamirs.interpolate([*points, shamirs.share(6, value, secure.PRIME)]) for value in range(50)
    }
    assert len(guesses) == 50
    assert secret not in guesses


def test_interpolation_agrees_with_the_library() -> None:
    secret = 2**128 - 1
    shares = shamirs.shares(secret, 9, modulus=secure.PRIME, threshold=5)
    assert secure.at_zero({share.index: share.value for share in shares[2:7]}) == shamirs.interpolate(shares[:5]) == secret


def test_too_many_drops_open_nothing(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    with pytest.raises(SecureError, match=r"too small to be opened|of too few|shares of client"):
        federation.run(inputs_of(federation.names), {"masked": federation.names[:3]})


def test_a_session_hides_one_answer(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    inputs = inputs_of(federation.names)
    federation.run(inputs)
    with pytest.raises(SecureError, match="has had its answer"):
        federation.mask("c000", federation.sealed, inputs["c001"])


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
        federation.mask("c000", federation.sealed, inputs["c000"])


def test_messages_of_another_session_are_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    federation.run(inputs_of(federation.names))
    adverts, sealed = federation.adverts, federation.sealed
    federation.session = new_session(federation.names)
    fresh = federation.keys(federation.names)
    with pytest.raises(SecureError, match="not signed by it"):
        federation.share("c000", adverts)
    for name in federation.names:
        federation.share(name, fresh)
    with pytest.raises(SecureError, match="changed on their way"):
        federation.mask("c000", sealed, {"x": torch.zeros(4, dtype=torch.int32)})


def test_forged_keys_are_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    adverts = federation.keys(federation.names)
    mallory = secure.make_credentials(federation.names)
    own = secure.keys(federation.session, "c001", replace(mallory["c001"], min_group=2), SessionStore(tmp_path / "mallory"))
    with pytest.raises(SecureError, match="'c001' are not signed by it"):
        federation.share("c000", {**adverts, "c001": own})
    changed = {**adverts["c001"], "mask": adverts["c002"]["mask"]}
    with pytest.raises(SecureError, match="'c001' are not signed by it"):
        federation.share("c000", {**adverts, "c001": changed})
    federation.share("c000", adverts)
    with pytest.raises(SecureError, match="other keys than before"):
        federation.share("c000", {name: adverts[name] for name in ("c000", "c001")})


def test_a_session_that_differs_between_clients_is_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4)
    told = federation.session
    federation.session = replace(told, threshold=4)
    others = federation.keys(federation.names[1:])
    federation.session = told
    mine = federation.keys(["c000"])
    with pytest.raises(SecureError, match="not signed by it"):
        federation.share("c000", {**others, **mine})


def test_changed_shares_are_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    adverts = federation.keys(federation.names)
    sealed = {name: federation.share(name, adverts) for name in federation.names}
    text = sealed["c001"]["c000"]
    sealed["c001"]["c000"] = ("0" if text[0] != "0" else "1") + text[1:]
    with pytest.raises(SecureError, match="'c001' were changed"):
        federation.mask("c000", sealed, {"x": torch.zeros(4, dtype=torch.int32)})
    sealed["c001"]["c000"] = sealed["c001"]["c002"]  # meant for another
    with pytest.raises(SecureError, match="'c001' were changed"):
        federation.mask("c000", sealed, {"x": torch.zeros(4, dtype=torch.int32)})


def test_survivors_that_did_not_sign_open_nothing(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 6)
    inputs = inputs_of(federation.names)
    adverts = federation.keys(federation.names)
    sealed = {name: federation.share(name, adverts) for name in federation.names}
    for name in federation.names:
        federation.mask(name, sealed, inputs[name])
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


def test_a_wrong_share_is_noticed(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    federation.run(inputs_of(federation.names))
    opening = Opening(federation.session, federation.adverts, federation.sealed)
    for name, answer in federation.masked.items():
        opening.add(name, answer)
    federation.revealed["c000"]["c001"]["self"] = f"{12345:034x}"
    with pytest.raises(SecureError, match="'c001' do not fit together"):
        opening.open(federation.revealed)


def test_whoever_is_not_on_the_signed_roster_is_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    mine = federation.credentials["c000"]
    memory = federation.memory["c000"]
    with pytest.raises(SecureError, match="'zed' is not on the roster"):
        secure.keys(new_session([*federation.names, "zed"]), "c000", mine, memory)
    forged = json.dumps({"clients": {**json.loads(mine.roster)["clients"], "zed": "00" * 32}}).encode()
    with pytest.raises(SecureError, match="not signed by the operator"):
        secure.keys(new_session([*federation.names, "zed"]), "c000", replace(mine, roster=forged), memory)
    with pytest.raises(SecureError, match="it takes 3 or more"):
        secure.keys(new_session(["c000", "c001"]), "c000", replace(mine, min_group=3), memory)


@pytest.mark.parametrize(
    "change",
    [{"threshold": 3}, {"quorum": 3}, {"degree": 3}, {"clients": ("b", "a")}, {"threshold": 7}, {"bits": 64.0}, {"bits": 65}],
)
def test_a_session_that_protects_nobody_is_refused(change: dict[str, Any]) -> None:
    facts = asdict(Session("x", tuple("abcdef"), 5, 4, 4))
    with pytest.raises(SecureError):
        Session.of({**facts, **change})


def test_secrets_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    federation.keys(federation.names)
    for file in tmp_path.rglob("*.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


# A whole job

OWNERS = ("ash", "birch", "cedar", "dogwood")


@pytest.fixture(scope="module")
def texts(small: Small) -> dict[str, list[str]]:
    words = "\n".join(path.read_text() for path in small.texts.values()).split()
    return {name: [" ".join(words[60 * i : 60 * i + 60])] for i, name in enumerate(OWNERS)}


class Recorder(LocalEngine):
    """Keeps what clients sent; some are silent in some asks."""

    seen: list[tuple[str, str, bytes]]
    silent: frozenset[tuple[str, str]] = frozenset()

    def ask(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        for client, answer, error in super().ask(kind, messages, timeout):
            if (client, kind) in self.silent:
                yield client, None, "gone"
                continue
            if answer is not None:
                self.seen.append((client, kind, answer))
            yield client, answer, error


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_a_job_gives_the_same_bits_with_and_without(
    small: Small, texts: dict[str, list[str]], tmp_path: Path, pruner: str
) -> None:
    class Engine(Recorder):
        seen = []  # noqa: RUF012

    plain = prune(small, tmp_path / "plain", texts, pruner=pruner)
    hidden = prune(small, tmp_path / "hidden", texts, Engine, privacy={"secure_aggregation": True}, pruner=pruner)
    assert hashes(hidden) == hashes(plain)
    answers = [wire.unpack(message)[0] for _, kind, message in Engine.seen if kind == "pooled"]
    assert len(answers) == 2 * len(OWNERS)
    for tensors in answers:
        joined = np.concatenate(as_rings(tensors))
        bits = statistics.ring_bits(LENGTH * len(OWNERS))
        assert uniform((joined >> np.uint64(bits - 8)).astype(np.uint8))
        assert uniform(joined.view(np.uint8).reshape(-1, 8)[:, : bits // 8].flatten())
        assert not (joined >> np.uint64(bits)).any()


@pytest.mark.parametrize("aggregation", ["fedspallm", "fedprllm"])
def test_pruned_weights_and_votes_give_the_same_bits_with_and_without(
    small: Small, texts: dict[str, list[str]], tmp_path: Path, aggregation: str
) -> None:
    stage = {"pruner": "sparsegpt", "aggregation": aggregation, "rounds": 2}
    plain = prune(small, tmp_path / "plain", texts, **stage)
    assert plain == prune(small, tmp_path / "hidden", texts, privacy={"secure_aggregation": True}, **stage)


@pytest.mark.parametrize("part", ["weight/", "change/"])
def test_votes_and_values_that_do_not_add_up_are_refused(
    small: Small, texts: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    honest = HANDLERS["prune"]

    def poison(tensors: Any, info: Any, site: LocalClient, device: str) -> Any:
        answer, told = honest(tensors, info, site, device)
        if site.name == "cedar":  # it votes for everything, or sends the largest number that the ring holds
            lie = 1 if part == "weight/" else 2**46
            answer = {
                name: torch.full_like(tensor, lie) if name.startswith(part) else tensor for name, tensor in answer.items()
            }
        return answer, told

    monkeypatch.setitem(HANDLERS, "prune", poison)
    with pytest.raises(FedgroveError, match="other votes or values than can be"):
        prune(
            small, tmp_path / "poisoned", texts, privacy={"secure_aggregation": True}, aggregation="fedspallm", pruner="wanda"
        )


@pytest.mark.parametrize("kind", ["secure-keys", "secure-shares", "pooled", "secure-check", "secure-open"])
def test_a_job_goes_on_when_a_client_drops_in_any_ask(
    small: Small, texts: dict[str, list[str]], tmp_path: Path, kind: str
) -> None:
    class Engine(Recorder):
        seen = []  # noqa: RUF012
        silent = frozenset({("cedar", kind)})

    hidden = prune(small, tmp_path / "hidden", texts, Engine, privacy={"secure_aggregation": True}, pruner="wanda")
    early = kind in ("secure-keys", "secure-shares", "pooled")
    rest = {name: text for name, text in texts.items() if not early or name != "cedar"}
    assert hashes(hidden) == hashes(prune(small, tmp_path / "rest", rest, pruner="wanda"))
    assert all(row[2] == sorted(rest) for row in hidden.values())


def test_a_client_with_credentials_answers_nothing_in_the_open(small: Small, tmp_path: Path) -> None:
    job = load(small.job("open", stages__0__rule="pooled", evaluate={}, privacy={"secure_aggregation": True}))
    site = server.local_engine(job, tmp_path)._sites["ash"]
    assert isinstance(site.credentials, Credentials)
    for kind in ("prune", "pooled", "evaluate"):
        with pytest.raises(Exception, match="only under secure aggregation"):
            serve(kind, wire.pack({}, {}), site, "cpu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages__0__rule": "mean"}, 'aggregation "fedavg": use'),
        ({"evaluate__alone": True}, "evaluate.alone: under secure"),
        ({"privacy__min_group": 4}, "privacy.min_group: 4 clients"),
        ({"stages__0__layers": {"sample": 0.5}}, "every client is in every sum"),
    ],
)
def test_jobs_that_secure_aggregation_cannot_do_are_refused(small: Small, changes: dict[str, Any], says: str) -> None:
    spec = {"stages__0__rule": "pooled", "privacy__secure_aggregation": True, "evaluate": {}, **changes}
    assert says in complaint("plan", small.job("refused", **spec))
