"""A pool of adapters: the gate's fit is exact, members add up to one adapter, one member is the run without a pool."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedgrove import run as server
from fedgrove.adopt import look
from fedgrove.data.windows import training_windows
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load, load_federated
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.secagg.keys import make_credentials
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.rounds.aggregator.secure import SecureAggregator
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Tensors
from fedgrove.rounds.wire import WireError
from fedgrove.runfolder import RunFolder
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.gates import keys, mixture, similar
from fedgrove.stages.tune.loops.pool import Loop
from fedgrove.stages.tune.pool import novelty
from fedgrove.stages.tune.pool.config import Pool
from fedgrove.stages.tune.pool.dealing import divide
from fedgrove.stages.tune.pool.finished import Pool as FinishedPool
from fedgrove.stages.tune.pool.fitting import Fit
from fedgrove.stages.tune.pool.scale import CLIP, CODE, between_owners, directions, directions_of, own_products, scaled, unit
from fedgrove.stages.tune.state import TuningState
from small import CLIENTS, Moment, Small, cli, complaint, killed, lines, make_model, measurements
from test_architectures import save

TUNE = {
    "kind": "tune", "method": "lora", "aggregation": "ffa_lora", "rounds": 2, "steps": 4, "length": 16, "batches": [2],
    "ranks": [2], "bits": [32], "learning_rate": 0.01,
}  # fmt: skip
SCALES = {"method": "ia3", "aggregation": None, "ranks": None, "learning_rate": 0.05}
MIXTURE = {"gate": "mixture", "members": 2, "common": 0.34, "size": 3, "prefix": 8, "starts": 2, "fit_rounds": 4}
OWN: dict[str, Any] = {"gate": "user_centric"}
GROUPS = {"gate": "groups", "common": 0.34, "groups": {"wood": ["ash", "birch"], "other": ["cedar"]}}


def tune(pool: dict[str, Any] | None, **changes: Any) -> list[dict[str, Any]]:
    stage = {**TUNE, **changes, **({} if pool is None else {"pool": pool})}
    return [{key: value for key, value in stage.items() if value is not None}]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("pool", "precision"), [({**GROUPS, "groups": {"all": list(CLIENTS)}}, "float32"),
                                                 ({**MIXTURE, "members": 1}, "float32"),
                                                 ({**MIXTURE, "gate": "keys", "members": 1}, "fixed"),
                                                 ({"gate": "losses", "members": 1, "common": 0.34, "windows": 2}, "float32"),
                                                 ({"gate": "losses", "members": 1, "common": 0.34, "windows": 2}, "ia3")],
                         ids=lambda one: one["gate"] if isinstance(one, dict) else one)  # fmt: skip
def test_a_pool_of_one_is_the_run_without_a_pool_bit_for_bit(small: Small, pool: dict[str, Any], precision: str) -> None:
    stage = SCALES if precision == "ia3" else {"precision": precision}
    alone, pooled = (small.undisturbed(stages=tune(of, **stage)) for of in (None, pool))
    for name, tensor in load_file(alone / "model" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(pooled / "model" / "model.safetensors")[name]), name
    without, with_pool = measurements(alone), measurements(pooled)
    assert {key: value for key, value in without.items() if key[3] != "clock"}.items() <= with_pool.items()


def test_a_member_of_one_owner_is_that_owners_run_alone_bit_for_bit(small: Small) -> None:
    groups = {"gate": "groups", "common": 0.0, "groups": {name: [name] for name in CLIENTS}}
    pool = FinishedPool.read(small.undisturbed(stages=tune(groups)))
    for name, member in zip(CLIENTS, pool.members, strict=True):
        alone = {**groups, "groups": {name: [name]}}
        run = small.undisturbed(stages=tune(alone), clients=[{"name": name, "data": str(small.texts[name])}])
        own = FinishedPool.read(run).members[0]
        assert member.keys() == own.keys()
        for linear, change in member.items():
            assert all(torch.equal(part, own[linear].parts()[of]) for of, part in change.parts().items()), (name, linear)


def test_a_pool_finds_its_number_of_members_if_its_gate_can() -> None:
    assert (Pool().gate, Pool().members, Pool(gate="keys").members) == ("similar", "auto", "auto")
    assert [Pool(gate=gate).members for gate in ("losses", "random")] == [4, 4]
    assert Pool(gate="keys", directions="windows").members == 4
    assert Pool(gate="groups", groups={"wood": ("ash",), "other": ("cedar",)}).members == 2


# The mixture


def pooled(name: str = "mixture", **changes: Any) -> Pool:
    return Pool(gate=name, **{**{key: value for key, value in MIXTURE.items() if key != "gate"}, **changes})


def shifted(owners: int = 8, size: int = 16, windows: int = 40) -> list[Tensor]:
    """Features of owners whose means differ, on the grid of features, with mean about 0 and variance about 1."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(2, size, generator=generator, dtype=torch.float64)
    shifts = 0.6 * torch.randn(owners, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(owners, windows, size, generator=generator, dtype=torch.float64)
    every = kinds[torch.arange(windows) % 2] + shifts[:, None] + 0.5 * noise
    every = (every - every.mean((0, 1))) / every.std((0, 1))
    return [CODE.decode(CODE.encode(of.clamp(-CLIP, CLIP))) for of in every]


def fit(owners: Sequence[Tensor], rounds: int, gate: Any = mixture, **changes: Any) -> tuple[list[float], Tensors, Tensors]:
    """The likelihood before each step, the state, and the last sums."""
    state, likelihoods = gate.begin(pooled(**changes), owners[0].shape[1], "0/0"), []
    sums: Tensors = {}
    for _ in range(rounds):
        each = [gate.observe(of, state) for of in owners]
        sums = {name: torch.stack([one[name] for one in each]).sum(0) for name in each[0]}
        gate.check(sums, sum(map(len, owners)))
        state, likelihood = gate.settle(state, sums)
        assert gate.is_valid(state)
        likelihoods.append(likelihood)
    return likelihoods, state, sums


@pytest.mark.parametrize("gate", [mixture, keys], ids=["mixture", "keys"])
def test_a_gate_of_any_owners_is_that_of_the_pooled_windows(gate: Any) -> None:
    owners = shifted()
    every = torch.cat(owners)
    dealt = {1: [every], 2: [every[:77], every[77:]], 8: owners, 9: list(reversed([*owners[:7], owners[7][:1], owners[7][1:]]))}
    found = [fit(of, 6, gate, members=3) for of in dealt.values()]
    for likelihoods, state, _ in found[1:]:
        assert likelihoods == found[0][0]
        assert all(torch.equal(state[name], value) for name, value in found[0][1].items())


def test_the_likelihood_never_falls_and_is_that_of_em_in_float64() -> None:
    owners = shifted()
    likelihoods, state, _ = fit(owners, 12, members=2, starts=1)
    assert all(after >= before - 1e-7 for before, after in itertools.pairwise(likelihoods)), "γ is rounded to 2⁻²⁰"
    x, begun = torch.cat(owners), mixture.begin(pooled(members=2, starts=1), 16, "0/0")
    means, variances, shares = begun["means"][0], begun["variances"][0], begun["shares"][0]
    for likelihood in likelihoods:
        normal = torch.distributions.Normal(means[:, None], variances.sqrt()[:, None])
        joint = shares.log()[:, None] + normal.log_prob(x[None]).sum(2)
        assert likelihood == pytest.approx(float(joint.logsumexp(0).mean()), abs=1e-6)
        gamma = joint.softmax(0)
        counts = gamma.sum(1, keepdim=True)
        means = gamma @ x / counts
        variances = (gamma @ x.square() / counts - means.square()).clamp_min(mixture.LEAST_VARIANCE)
        shares = counts[:, 0] / len(x)
    torch.testing.assert_close(state["means"][0], means, rtol=0, atol=1e-4)


def test_keys_are_spherical_k_means_and_their_cosine_never_falls() -> None:
    owners = shifted()
    cosines, state, _ = fit(owners, 12, keys, members=3, starts=1)
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(cosines)), "directions are rounded to 1/256"
    x, centers = torch.nn.functional.normalize(torch.cat(owners)), keys.begin(pooled(members=3, starts=1), 16, "0/0")["keys"][0]
    for _ in cosines:
        nearest = (x @ centers.T).argmax(1)
        centers = torch.nn.functional.normalize(torch.stack([x[nearest == member].sum(0) for member in range(3)]))
    torch.testing.assert_close(state["keys"][0], centers, rtol=0, atol=2e-3)
    assert torch.equal(keys.weights(x, state).argmax(1), (x @ centers.T).argmax(1))


def test_directions_between_owners_tell_kinds_apart_that_all_windows_together_do_not() -> None:
    """Two kinds differ along one of 32 numbers, where nothing varies much, and owners have them in unequal parts."""
    generator = torch.Generator().manual_seed(4)
    owners, kinds = [], []
    for owner in range(6):
        of = (torch.rand(200, generator=generator) < (0.1, 0.3, 0.9, 0.7, 0.2, 0.8)[owner]).long()
        numbers = torch.randn(200, 32, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.5, 32).double()
        numbers[:, 30] += torch.where(of == 1, 2.0, -2.0)
        owners.append(CODE.decode(CODE.encode(numbers)))
        kinds.append(of)
    each = [Moments.over(of, torch.zeros(200, dtype=torch.int64), 1, products=True) for of in owners]
    every, own = functools.reduce(Moments.plus, each), torch.stack([own_products(of) for of in each]).sum(0)
    found = {}
    for which, (mean, along) in {"owners": between_owners(every, own, 5, 6), "windows": directions(every, 5)}.items():
        seen = [scaled(of, mean, along) for of in owners]
        _, state, sums = fit(seen, 10, keys, members=2, starts=4)
        final = keys.finish(state, sums, 1)
        of_windows = torch.cat([keys.weights(of, final).argmax(1) for of in seen])
        share = float((of_windows == torch.cat(kinds)).double().mean())
        found[which] = max(share, 1 - share)
    _, along = between_owners(every, own, 5, 6)
    assert along.shape == (32, 1), "along the others the owners' means are as far apart as by chance"
    inside = torch.cat([of - of.mean(0) for of in owners]) @ along
    assert float(inside.var(0).max()) < 1.0, "the ridge makes them a little narrower"
    assert float(inside.var(0).min()) > 0.6
    assert found["owners"] > 0.9 > 0.7 > found["windows"]


def test_a_key_without_windows_begins_again_beside_the_largest() -> None:
    x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.2]], dtype=torch.float64))
    state = {"keys": torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)}
    assert keys.observe(x, state)["counts"].tolist() == [[3, 0]]
    state, _ = keys.settle(state, keys.observe(x, state))
    assert bool((state["keys"][0] @ state["keys"][0].T > 0.9).all())


def test_similar_owners_go_to_one_member_with_all_their_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = 2 * torch.eye(4, dtype=torch.float64)[[0, 1, 0, 1, 0]]
    windows = [kind + torch.randn(30, 4, generator=generator, dtype=torch.float64) + 5.0 for kind in kinds]
    directions = [directions_of(unit(of, torch.eye(4, dtype=torch.float64)).sum(0, keepdim=True)) for of in windows]
    assert all(float(of.norm()) == pytest.approx(1.0, abs=1e-4) for of in directions)
    owners = [of - torch.stack(directions).mean(0) for of in directions]  # what all have in common says nothing
    _, state, sums = fit(owners, 6, similar, members=2, starts=4)
    assert sums["counts"].sum(1).tolist() == [5] * 4, "an owner is one point, however many windows it has"
    final = similar.finish(state, sums, 2)
    members = [similar.weights(of, final) for of in owners]
    assert all(of.shape == (1, 2) and of.sum() == 1.0 for of in members)
    found = [int(of[0].argmax()) for of in members]
    assert found == [found[0], 1 - found[0], found[0], 1 - found[0], found[0]]
    assert similar.finish(state, sums, 3)["keys"].shape[1] == 1, "two owners are too few"


@pytest.mark.parametrize(("kinds", "fewest", "found"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (3, 3, 1)])
def test_as_many_members_as_there_are_kinds_of_owners(kinds: int, fewest: int, found: int) -> None:
    """Seven owners, each with two halves of its text; a half says of the other one what owners of a kind have in common."""
    generator = torch.Generator().manual_seed(1)
    of_kinds = 3 * torch.eye(16, dtype=torch.float64)[:kinds]
    owners = []
    for owner in range(7):
        windows = of_kinds[owner % kinds] + torch.randn(80, 16, generator=generator, dtype=torch.float64) + 1.0
        halves = unit(windows, torch.eye(16, dtype=torch.float64)).tensor_split(2)
        owners.append(directions_of(torch.stack([half.sum(0) for half in halves])))
    assert all(of.shape == (3, 16) for of in owners)
    mean = torch.stack(owners).mean(0)
    rows = [of - mean for of in owners]
    state = similar.begin(pooled("similar", members="auto", starts=4), 16, "0/0")
    assert similar.is_valid(state)
    assert keys.used(state).sum(1).tolist() == [number for number in range(1, 9) for _ in range(4)]
    for _ in range(8):
        each = [similar.observe(of, state) for of in rows]
        sums = {name: torch.stack([one[name] for one in each]).sum(0) for name in each[0]}
        similar.check(sums, 7)
        state, _ = similar.settle(state, sums)
        assert similar.is_valid(state)
    final = similar.finish(state, sums, fewest)
    members = [int(similar.weights(of, final).argmax()) for of in rows]
    assert final["keys"].shape[1] == found
    assert len(set(members)) == found
    if fewest == 1:
        assert all(member == members[owner % kinds] for owner, member in enumerate(members))


OF_WORD = {"ash": "tree", "birch": "river", "cedar": "tree", "date": "river"}


def of_two_kinds(small: Small, rows: int, secure: bool) -> dict[str, Any]:
    """Changes of a job: four owners, each with one word over and over, two of them with the same one."""
    for word in ("tree", "river"):
        (small.folder / f"only-{word}.txt").write_text(f"{' '.join([word] * 12)}\n" * rows)
    return {
        "clients": [{"name": name, "data": str(small.folder / f"only-{word}.txt")} for name, word in OF_WORD.items()],
        "privacy": {"min_group": 2, "secure_aggregation": secure},
        "evaluate": {},
    }


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_a_pool_finds_its_number_of_members(small: Small, secure: bool) -> None:
    job = of_two_kinds(small, 20, secure)
    pool = {**KEYS, "gate": "similar", "members": "auto"}
    runs = [small.undisturbed(stages=tune(one, **FIXED), **job) for one in (pool, pool | {"members": 2})]
    facts = [FinishedPool.read(run).facts for run in runs]
    assert [of["members"] for of in facts] == [2, 2]
    assert facts[0]["windows"] in (facts[1]["windows"], facts[1]["windows"][::-1])
    plan = json.loads((runs[0] / "plan-0-tune.json").read_text())
    assert "all of at most 2 members" in " ".join(plan["notes"]), "a member has two owners, and there are four"
    assert "a pool of as many as there are kinds by similar" in (runs[0] / "report.html").read_text()


def test_a_gate_that_finds_the_number_needs_no_more_windows_than_there_are(small: Small) -> None:
    run = small.undisturbed(stages=tune({**KEYS, "members": "auto"}), **of_two_kinds(small, 2, False))
    assert FinishedPool.read(run).facts["members"] == 1


@pytest.mark.parametrize("gate", ["keys", "similar"])
@pytest.mark.parametrize("precision", ["float32", "fixed"])
def test_owners_who_are_all_alike_train_one_member(small: Small, tmp_path: Path, gate: str, precision: str) -> None:
    names = ("ash", "birch", "cedar", "date")
    lines_ = [line for file in small.texts.values() for line in file.read_text(encoding="utf-8").splitlines()]
    clients = []
    for number, name in enumerate(names):
        file = small.folder / f"alike-{name}.txt"
        file.write_text("\n".join(lines_[number::4]), encoding="utf-8")
        clients.append({"name": name, "data": str(file)})
    pool = {**KEYS, "gate": gate, "members": "auto"}
    job, out = small.job("alike", stages=tune(pool, precision=precision), clients=clients, evaluate={}), tmp_path / "run"
    status, _, told = cli("run", job, "--out", out)
    assert status == 0, told
    assert "tells no kinds of text apart that 3 clients or more have (privacy.min_group), so the pool has one member" in told
    assert FinishedPool.read(out).facts["members"] == 1
    assert "one adapter was trained, as without a pool" in (out / "report.html").read_text(encoding="utf-8")


def test_averaging_the_owners_covariances_as_the_source_does_is_no_m_step() -> None:
    """FedGMM's server: the weighted mean of the owners' own means and of their own variances (reference of its code)."""
    owners = shifted()
    _, state, _ = fit(owners, 12, members=2, starts=1)

    def likelihood(of: Tensors) -> float:
        each = [mixture.observe(features, of) for features in owners]
        return sum(int(one["likelihood"]) for one in each) / sum(int(one["counts"].sum()) for one in each)

    theirs = mixture.begin(pooled(members=2, starts=1), 16, "0/0")
    for _ in range(12):
        own = [mixture.settle(theirs, mixture.observe(features, theirs))[0] for features in owners]
        counts = torch.stack([mixture.observe(features, theirs)["counts"].double() for features in owners])
        part = (counts / counts.sum(0))[..., None]
        theirs = {name: (part * torch.stack([one[name] for one in own])).sum(0) for name in ("means", "variances")}
        theirs["shares"] = counts.sum(0) / counts.sum()
    assert float(theirs["variances"].mean()) < 0.8 * float(state["variances"].mean())
    assert likelihood(theirs) < likelihood(state) - 0.1


def test_components_that_too_few_owners_hold_are_dropped() -> None:
    generator = torch.Generator().manual_seed(0)

    def around(center: float) -> Tensor:
        return CODE.decode(CODE.encode(center + 0.2 * torch.randn(30, 2, generator=generator, dtype=torch.float64)))

    owners = [around(-1), around(-1), around(2)]
    _, state, sums = fit(owners, 8, members=2, starts=4)
    assert mixture.finish(state, sums, 1)["shares"].shape == (1, 2)
    kept = mixture.finish(state, sums, 2)
    assert kept["shares"].tolist() == [[1.0]]
    torch.testing.assert_close(kept["means"][0, 0], torch.full((2,), -1.0, dtype=torch.float64), rtol=0, atol=0.2)


def test_an_owners_weights_are_its_own_and_new_text_is_surprising() -> None:
    generator = torch.Generator().manual_seed(0)
    x = [CODE.decode(CODE.encode(c + 0.3 * torch.randn(60, 3, generator=generator, dtype=torch.float64))) for c in (-1, 1, 6)]
    _, state, sums = fit(x[:2], 8, members=2, starts=4)
    final = mixture.finish(state, sums, 1)
    weights = torch.stack([mixture.weights(of, final).mean(0) for of in x[:2]])
    torch.testing.assert_close(weights.max(1).values, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-3)
    assert weights.argmax(1).unique().numel() == 2
    counts = novelty.count(torch.cat([mixture.surprise(of, final) for of in x[:2]]))
    assert counts.sum() == 120
    like, unlike = (novelty.p_values(mixture.surprise(of, final), counts) for of in (x[0], x[2]))
    assert bool((unlike < 0.01).all())
    assert 0.0 < float((like < 0.05).double().mean()) < 0.12


@pytest.mark.parametrize("gate", [mixture, keys], ids=["mixture", "keys"])
def test_sums_that_no_windows_have_are_refused(gate: Any) -> None:
    owners = shifted()
    sums = gate.observe(owners[0], gate.begin(pooled(), 16, "0/0"))
    gate.check(sums, 40)
    values = {"counts": -1, "sums": 2**60, "squares": -1, "likelihood": 2**62, "cosines": 2**62, "holders": -1}
    for name in sums:
        wrong = {**sums, name: sums[name].clone()}
        wrong[name].view(-1)[0] = values[name]
        with pytest.raises(WireError):
            gate.check(wrong, 40)
    with pytest.raises(WireError):
        gate.check(sums, 20)


def test_a_state_that_singles_windows_out_is_none() -> None:
    state = mixture.begin(pooled(), 3, "0/0")
    assert mixture.is_valid(state)
    assert not mixture.is_valid(state | {"variances": state["variances"] * 1e-3})
    assert not mixture.is_valid(state | {"shares": state["shares"] * 2})
    directions = keys.begin(pooled(), 3, "0/0")
    assert keys.is_valid(directions)
    assert not keys.is_valid({"keys": directions["keys"] * 2})


def test_steps_are_divided_as_windows_are() -> None:
    assert divide(8, [30, 10, 0]) == (6, 2, 0)
    assert divide(4, [1, 1, 1]) == (2, 1, 1)
    for steps, windows in itertools.product((1, 7, 16), ([5, 9, 1, 0], [1], [100, 1])):
        found = divide(steps, windows)
        assert sum(found) == steps
        assert all(part == 0 for part, number in zip(found, windows, strict=True) if number == 0)


# Runs


def loop_of(small: Small, folder: Path, secure: bool) -> Loop:
    """A stage before its first round, whose sums are computed in the open or securely."""
    job = load(small.job("fit", stages=tune(MIXTURE)))
    model, run = server.open_model(job.model), RunFolder(folder, job)
    clients = server.local_clients(job, model, folder / "clients")
    if secure:
        credentials = make_credentials(CLIENTS)
        clients = [replace(client, credentials=credentials[client.name]) for client in clients]
    federation = Federation(LocalEngine(clients), run)
    if secure:
        object.__setattr__(federation, "aggregator", SecureAggregator(federation.engine, run))
    (plan,) = server.make_plans(job, model, federation)
    config = job.stages[0]
    assert isinstance(config, Config)
    return Loop(model, Decoder(model), config, federation, TuningState(plan))


def test_a_gate_has_the_same_bits_in_the_open_and_under_secure_aggregation(small: Small, tmp_path: Path) -> None:
    loops = [loop_of(small, tmp_path / str(secure), secure) for secure in (False, True)]
    in_the_open, securely = (Fit(loop, loop.pool, loop._common).run() for loop in loops)
    assert in_the_open.keys() == securely.keys()
    assert all(torch.equal(securely[name], value) for name, value in in_the_open.items())


def test_members_have_the_same_bits_in_the_open_and_under_secure_aggregation(small: Small) -> None:
    groups = {"gate": "groups", "common": 0.5, "groups": {"all": list(CLIENTS)}}
    stages = tune(groups, precision="fixed", rounds=2, steps=1)
    runs = [
        small.undisturbed(stages=stages, privacy={"secure_aggregation": secure, "min_group": 3}, evaluate={})
        for secure in (False, True)
    ]
    in_the_open, securely = (files_of(run) for run in runs)
    for name in ("pool/member-0.safetensors", "model/model.safetensors"):
        assert in_the_open[name] == securely[name]


KEYS = {**MIXTURE, "gate": "keys", "members": 3}
FIXED = {"precision": "fixed", "rounds": 2, "steps": 4, "learning_rate": 0.05}


@pytest.mark.parametrize("stage", [{}, SCALES], ids=["lora", "ia3"])
def test_members_of_windows_have_the_same_bits_in_the_open_and_under_secure_aggregation(
    small: Small, stage: dict[str, Any]
) -> None:
    stages = tune(KEYS, **FIXED | stage)
    runs = [
        small.undisturbed(stages=stages, privacy={"secure_aggregation": secure, "min_group": 3}, evaluate={})
        for secure in (False, True)
    ]
    in_the_open, securely = (files_of(run) for run in runs)
    assert in_the_open.keys() == securely.keys()
    differ = {name for name, value in in_the_open.items() if securely[name] != value}
    assert differ == {"model/README.md"}, "which says that sums were secure"
    facts = json.loads(securely["pool/pool.json"])
    assert facts["members"] == 3, "else nothing was dealt"
    assert sum(facts["windows"]) == 59
    assert facts["clients"] == {}, "nobody knows whose windows they are"
    sent = {line["kind"]: line["bytes"] for line in lines(runs[0] / "ledger.jsonl") if line["direction"] == "up"}
    assert 2 * sent["tune/train"] < sent["tune/members"] <= 3 * sent["tune/train"], "three adapters in one message"


def files_of(run: Path) -> dict[str, bytes]:
    """What a run must give bit for bit."""
    folders = [run / name for name in ("model", "adapter", "pool")]
    return {str(file.relative_to(run)): file.read_bytes() for folder in folders for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("pool", "moment", "secure"),
    [
        (MIXTURE, "*/gate-0002.safetensors", False),
        (MIXTURE, "*/member-0001-01.safetensors", False),
        (KEYS, "*/member-0001-00.safetensors", True),
        (OWN, "*/owners-0001.safetensors", False),
        (OWN, "*/member-0001-02.safetensors", False),
        (OWN, "*/changes-0002.safetensors", False),
        (OWN, "*/pool", False),
    ],
)
def test_a_killed_pool_goes_on_to_the_same_bits(
    small: Small, tmp_path: Path, pool: dict[str, Any], moment: str, secure: bool
) -> None:
    changes: dict[str, Any] = {"stages": tune(pool, rounds=3)}
    if secure:
        changes = {"stages": tune(KEYS, **FIXED), "evaluate": {}, "privacy": {"secure_aggregation": True, "min_group": 3}}
    whole = small.undisturbed(**changes)
    job = small.job("killed", **changes)
    killed("run", job, "--out", tmp_path / "run", moment=Moment("os.rename", moment))
    assert cli("run", job, "--out", tmp_path / "run", "--resume")[0] == 0
    assert files_of(tmp_path / "run") == files_of(whole)
    assert {key: value for key, value in measurements(tmp_path / "run").items() if "loss" in key[3]} == {
        key: value for key, value in measurements(whole).items() if "loss" in key[3]
    }


def test_owners_who_are_alike_train_one_member_and_nobody_learns_which(small: Small) -> None:
    small.one_word("tree", "river", "tree")
    names = {"ash": "tree", "birch": "river", "cedar": "tree", "date": "river"}
    clients = [{"name": name, "data": str(small.folder / f"only-{word}.txt")} for name, word in names.items()]
    pool = {**KEYS, "gate": "similar", "members": 2}
    secure = {"privacy": {"secure_aggregation": True, "min_group": 2}, "evaluate": {}}
    run = small.undisturbed(stages=tune(pool, **FIXED), clients=clients, **secure)
    found = FinishedPool.read(run)
    assert len(found.facts["windows"]) == 2
    assert found.facts["clients"] == {}
    members = [look(run, small.folder / f"only-{word}.txt").weights for word in ("tree", "river")]
    assert bool((members[0].argmax(1) != int(members[1][0].argmax())).all())


def test_a_member_that_too_few_would_train_is_dropped_and_its_windows_go_to_others(small: Small) -> None:
    clients = []
    for name, rows in zip(CLIENTS, ((54, 4), (54, 4), (28, 28)), strict=True):  # of words of either kind
        file = small.folder / f"two-words-{name}.txt"
        file.write_text("\n".join(" ".join([word] * 12 * row) for word, row in zip(("tree", "river"), rows, strict=True)))
        clients.append({"name": name, "data": str(file)})
    more: dict[str, Any] = {"clients": clients, "evaluate": {}, "privacy": {"min_group": 3}}
    apart, in_sums = (small.undisturbed(stages=tune(KEYS | {"members": 2, "size": 1}, **of), **more) for of in ({}, FIXED))
    dealt = FinishedPool.read(apart).facts["clients"]
    assert all(0 < min(dealt[name]) < 0.1 * max(dealt[name]) for name in ("ash", "birch")), "they would not train it"
    facts = FinishedPool.read(in_sums).facts
    assert facts["windows"] == [sum(map(sum, dealt.values()))]


@pytest.mark.parametrize("stage", [{}, SCALES], ids=["lora", "ia3"])
def test_members_add_up_to_the_model_for_all_and_plain_peft_loads_it(small: Small, stage: dict[str, Any]) -> None:
    run = small.undisturbed(stages=tune(GROUPS, **stage), model__dtype="float32")
    pool = FinishedPool.read(run)
    assert pool.facts["clients"] == {"ash": [0, 22], "birch": [0, 19], "cedar": [18, 0]}
    for file in (run / "pool").iterdir():
        assert str(small.folder).encode() not in file.read_bytes(), f"{file.name} names a folder of this machine"
    decoder = pool.model()
    of_all, adapter = pool.mix(pool.shares), load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(of_all) == len(decoder.linear_names())
    for name, change in of_all.items():
        key = f"base_model.model.{name}"
        if stage:
            torch.testing.assert_close(adapter[f"{key}.ia3_l"][:, 0], (1 + change.s).float(), rtol=1e-6, atol=0)
            continue
        assert change.rank == TUNE["ranks"][0], "a mixture has the members' rank"
        found = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
        torch.testing.assert_close(found, change.product(), rtol=1e-4, atol=1e-7)
    ids, labels = training_windows([small.texts["ash"]], {"text": "{text}"}, decoder.checkpoint.tokenizer(), 16)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32), run / "adapter")
    with torch.no_grad():
        expected = plain(ids[:2], labels=labels[:2]).loss
        parts = pool.losses(decoder, of_all, (ids[:2], labels[:2]))
    assert sum(loss for loss, _ in parts) / sum(count for _, count in parts) == pytest.approx(float(expected), rel=1e-4)


def test_a_client_trains_as_many_steps_as_without_a_pool_and_sends_no_more_than_it_uses(small: Small) -> None:
    run, alone = small.undisturbed(stages=tune(GROUPS)), small.undisturbed(stages=tune(None))

    def sent(of: Path) -> dict[str, list[int]]:
        up = [line for line in lines(of / "ledger.jsonl") if line["direction"] == "up" and line["kind"] == "tune/train"]
        return {client: sorted(line["bytes"] for line in up if line["client"] == client) for client in CLIENTS}

    for client, sizes in sent(run).items():
        assert len(sizes) == len(sent(alone)[client])
        assert sum(sizes) <= 1.05 * sum(sent(alone)[client])


@pytest.mark.parametrize(("precision", "each"), [("bfloat16", 1.395), ("fixed", 4.0)])
def test_the_one_a_of_all_travels_in_no_direction_and_is_not_planned(small: Small, precision: str, each: float) -> None:
    run = small.undisturbed(stages=tune(None, precision=precision))
    decoder, rank = Decoder(Checkpoint(small.model)), TUNE["ranks"][0]
    rows = sum(decoder.read_shape(name)[0] for name in decoder.linear_names())
    for one in json.loads((run / "plan-0-tune.json").read_text())["clients"].values():
        assert one["upload"] == pytest.approx(each * rank * rows, rel=0.01)
        assert one["download"] == pytest.approx((1.395 if precision == "bfloat16" else 3.395) * rank * rows, rel=0.01)


def test_a_newcomer_gets_the_member_that_suits_its_text(small: Small, tmp_path: Path) -> None:
    words = small.one_word("tree", "tree", "river")
    groups = {"gate": "groups", "common": 0.0, "groups": {"tree": ["ash", "birch"], "river": ["cedar"]}}
    run = small.undisturbed(stages=tune(groups, steps=6, learning_rate=0.03), **words)
    new = small.folder / "only-river.txt"
    status, out, err = cli("adopt", run, "--data", new, "--out", tmp_path / "mine", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["choice"] == "member 0"
    assert found["weights"] == [1.0, 0.0]
    assert found["losses"]["member 0"] < 0.7 * min(found["losses"]["none"], found["losses"]["member 1"])
    assert found["forwards"] == 4 * found["windows"]
    base = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32)
    ids, _ = training_windows([new], {"text": "{text}"}, Checkpoint(small.model).tokenizer(), 16)
    with torch.no_grad():
        before = float(base(ids[:4], labels=ids[:4]).loss)
        after = float(PeftModel.from_pretrained(base, tmp_path / "mine")(ids[:4], labels=ids[:4]).loss)
    assert after < 0.7 * before
    assert cli("adopt", run, "--data", new, "--out", tmp_path / "told", "--group", "river")[0] == 0
    assert load_file(tmp_path / "told" / "adapter_model.safetensors").keys()
    assert "no such group" in complaint("adopt", run, "--data", new, "--out", tmp_path / "x", "--group", "sea")


def test_a_newcomer_of_owners_who_are_alike_gets_the_best_member_and_hears_how_unusual_it_is(
    small: Small, tmp_path: Path
) -> None:
    job = of_two_kinds(small, 20, False)
    run = small.undisturbed(stages=tune({**KEYS, "gate": "similar", "members": 2}, steps=6, learning_rate=0.03), **job)
    found = {}
    for by in ((), ("--by", "losses"), ("--by", "gate")):
        mine = tmp_path / f"mine{len(found)}"
        status, out, err = cli("adopt", run, "--data", small.folder / "only-river.txt", "--out", mine, *by, "--json")
        assert status == 0, err
        found[by[-1] if by else ""] = json.loads(out)
    assert found[""]["weights"] == found["losses"]["weights"] == found["gate"]["weights"]
    assert found[""]["choice"].startswith("member")
    assert (found[""]["unlike"], found["losses"]["unlike"]) == (found["gate"]["unlike"], None)
    assert [one["forwards"] / one["windows"] for one in found.values()] == [5, 4, 4]


def test_a_gate_tells_weights_and_how_unusual_texts_are(small: Small, tmp_path: Path) -> None:
    run = small.undisturbed(stages=tune(MIXTURE), model__dtype="float32")  # on the disk it is bfloat16
    status, out, err = cli("gate", run, "--data", small.texts["ash"], "--json")
    assert status == 0, err
    rows = json.loads(out)
    assert all(sum(row["weights"]) == pytest.approx(1) and 0 < row["p"] <= 1 for row in rows)
    assert "member 1" in cli("gate", run, "--data", small.texts["ash"], "--most", "2")[1]
    status, out, err = cli("adopt", run, "--data", small.texts["ash"], "--out", tmp_path / "mine", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert set(found["losses"]) == {"none", "shared", "mixture"}
    assert found["forwards"] == 4 * found["windows"]
    assert 0 <= found["unlike"] <= 1


def test_an_owner_who_is_kept_out_of_a_run_is_shown_what_it_would_get(small: Small, tmp_path: Path) -> None:
    out = {"evaluate__new": ["cedar"], "evaluate__data": None}
    run = small.undisturbed(stages=tune(MIXTURE), privacy={"min_group": 2}, **out)
    found = json.loads((run / "new.json").read_text(encoding="utf-8"))["owners"]
    assert found.keys() == {"cedar"}
    assert {line["client"] for line in lines(run / "ledger.jsonl")} == {"ash", "birch"}, "it had no part in the run"
    status, said, err = cli("adopt", run, "--data", small.texts["cedar"], "--out", tmp_path / "mine", "--json")
    assert status == 0, err
    adopted = json.loads(said)
    for key in ("choice", "weights", "losses", "error", "unlike", "windows", "forwards"):
        assert found["cedar"][key] == adopted[key], key
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "1 owner had no part in the run" in page
    assert "What owners who were not there get from the pool" in page
    whole = small.spec(stages=tune(MIXTURE), privacy={"min_group": 2}, evaluate={})
    whole["clients"] = [client for client in whole["clients"] if client["name"] != "cedar"]
    (tmp_path / "two.toml").write_text(tomli_w.dumps(whole), encoding="utf-8")
    assert cli("run", tmp_path / "two.toml", "--out", tmp_path / "two")[0] == 0
    assert files_of(tmp_path / "two") == files_of(run), "as if the job had never named it"


def test_groups_with_noise_in_every_step_promise_what_one_adapter_does(small: Small, tmp_path: Path) -> None:
    """Every owner trains one member with all its windows, as many steps as without a pool, with its own noise."""
    pytest.importorskip("dp_accounting")
    noisy = {"epsilon": 8.0, "delta": 1e-3, "eval_every": 1}
    whole = small.undisturbed(stages=tune(GROUPS, **noisy))
    notes = [
        json.loads((run / "plan-0-tune.json").read_text())["notes"]
        for run in (whole, small.undisturbed(stages=tune(None, **noisy)))
    ]
    assert notes[0][0] == notes[1][0]
    assert "with this window, or with a window in its place that has no gradient), towards everybody" in notes[0][0]
    other = tmp_path / "other"
    assert cli("run", small.job("again", stages=tune(GROUPS, **noisy)), "--out", other, "--quiet")[0] == 0
    members = [[load_file(file) for file in sorted((run / "pool").glob("member-*.safetensors"))] for run in (whole, other)]
    assert len(members[0]) == 2
    for one, two in zip(*members, strict=True):
        assert not any(torch.equal(one[name], two[name]) for name in one), "noise repeats"


@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_owners_who_are_alike_are_found_with_noise_on_one_direction_each(small: Small, tmp_path: Path, secure: bool) -> None:
    """The gate has a quarter of the budget, and every step as much noise as the rest of it leaves."""
    pytest.importorskip("dp_accounting")
    names, job = OF_WORD, of_two_kinds(small, 100, secure)  # many windows: noise is small beside how far apart the kinds are
    budget = {"epsilon": 50.0, "delta": 0.05, **(FIXED if secure else {})}
    pool = {**KEYS, "gate": "similar", "members": 2, "size": 4}
    run = small.undisturbed(stages=tune(pool, **budget), **job)
    plans = [
        json.loads((one / "plan-0-tune.json").read_text())
        for one in (run, small.undisturbed(stages=tune(None, **budget), **job))
    ]
    promise = plans[0]["notes"][0]
    assert "one release of the sum of all windows' features, each of norm 1, for 25% of the budget, and " in promise
    assert "in its place that has no gradient and no features)" in promise
    assert all(plans[0]["noise"][name] >= plans[1]["noise"][name] for name in names)
    kinds = {line["kind"] for line in lines(run / "ledger.jsonl")}
    assert "tune/gate/direction" in kinds
    assert "tune/gate/features" not in kinds
    assert "LIKELIHOODS" not in plans[0]["discloses"]
    assert "FEATURE_PRODUCTS" not in plans[0]["discloses"]
    finished = FinishedPool.read(run)
    decoder, tokenizer = finished.model(), Checkpoint(small.model).tokenizer()
    looked = {}
    for word in ("tree", "river"):
        ids, _ = training_windows([small.folder / f"only-{word}.txt"], {"text": "{text}"}, tokenizer, 16)
        weights, p = finished.look(decoder, list(ids))
        looked[word] = int(weights[0].argmax())
        assert p is None
    assert looked["tree"] != looked["river"]
    if not secure:
        assert {name: of.index(max(of)) for name, of in finished.facts["clients"].items()} == {
            name: looked[word] for name, word in names.items()
        }
    status, out, err = cli("gate", run, "--data", small.folder / "only-tree.txt")
    assert status == 0, err
    assert "No p: the gate was fitted with noise" in out
    said = json.loads(cli("gate", run, "--data", small.folder / "only-tree.txt", "--json")[1])
    assert said[0]["p"] is None
    again = small.job("again", stages=tune(pool, **budget), **job)
    assert cli("run", again, "--out", tmp_path / "again", "--quiet")[0] == 0
    gates = [load_file(one / "pool" / "gate.safetensors") for one in (run, tmp_path / "again")]
    assert not torch.equal(gates[0]["mean"], gates[1]["mean"]), "noise repeats"


# Mistakes


@pytest.mark.parametrize(
    ("pool", "stage", "words"),
    [
        (
            {**GROUPS, "gate": "group"},
            {},
            ("stages.0.pool.gate", "groups, keys, losses, mixture, random, similar, user_centric"),
        ),
        ({"gate": "similar", "members": 2, "directions": "windows"}, {}, ("pool", "directions", "does not use it")),
        ({"gate": "losses", "members": "auto"}, {}, ("pool", 'members: gate "losses" does not find their number; give one')),
        ({"gate": "keys", "members": "auto", "directions": "windows"}, {}, ("pool", "do not tell how many there are")),
        ({"gate": "similar", "members": "auto", "starts": 9}, {}, ("stages.0.pool", "starts: 8 at most")),
        ({"gate": "random", "members": 4}, {}, ("stages.0.pool.members", "3 clients", "lower it")),
        ({"gate": "losses", "members": 5}, {}, ("stages.0.pool.members", "3 clients")),
        ({**MIXTURE, "members": 64}, {}, ("stages.0.pool.members: 64, but all clients have 59 windows",)),
        (GROUPS, {"aggregation": "flexlora"}, ("stages.0", "pool", 'aggregation = "ffa_lora"')),
        (GROUPS, {**SCALES, "method": "full"}, ("pool", 'set method = "lora" or "ia3"')),
        (GROUPS, {**SCALES, "method": "seeds", "bits": None}, ("pool", 'set method = "lora" or "ia3"')),
        (GROUPS, {"personal": 0.2}, ("pool", "personal", "leave one of them out")),
        (MIXTURE, {"epsilon": 8.0}, ("stages.0", "epsilon", "get no noise", 'set gate = "similar" or "groups"')),
        ({"gate": "losses"}, {"epsilon": 8.0}, ("stages.0", "epsilon", 'set gate = "similar" or "groups"')),
        (GROUPS, {"epsilon": 8.0, "dp_unit": "client", "precision": "fixed"}, ("epsilon", 'set dp_unit = "window"')),
        ({**MIXTURE, "groups": {"wood": ["ash"]}}, {}, ("pool", "groups", "does not use it")),
        ({"gate": "groups"}, {}, ("stages.0.pool.groups", "who belongs together")),
        ({**OWN, "members": 3}, {}, ("pool", 'members: gate "user_centric" has one for each client; leave members out')),
        ({**OWN, "common": 0.5}, {}, ("pool", 'common: gate "user_centric" does not use it')),
        (OWN, {**SCALES, "server_optimizer": "adam"}, ("stages.0", "leave server_optimizer and server_lr out")),
        ({**GROUPS, "groups": {"wood": ["ash", "oak"]}}, {}, ("stages.0.pool.groups.wood", "'oak' is no client")),
        ({**GROUPS, "groups": {"wood": ["ash"], "other": ["ash"]}}, {}, ("'ash' is in a group already",)),
        ({**GROUPS, "groups": {"wood": ["ash", "birch"]}}, {}, ("client 'cedar' is in no group",)),
    ],
    ids=lambda value: None,
)
def test_a_pool_that_cannot_be_trained_is_refused(
    small: Small, pool: dict[str, Any], stage: dict[str, Any], words: tuple[str, ...]
) -> None:
    line = complaint("plan", small.job("bad", stages=tune(pool, **stage)))
    assert all(word in line for word in words), line


def test_scales_beside_biases_make_no_pool(small: Small, tmp_path: Path, grove: Path) -> None:
    biased = Small(tmp_path, save("qwen2", tmp_path / "model", grove, torch.float32))
    line = complaint("plan", biased.job("biased", stages=tune(GROUPS, **SCALES), evaluate={}))
    assert 'stages.0.pool: the model\'s linears have biases, which plain peft would scale too; set method = "lora"' in line


@pytest.mark.parametrize(
    ("pool", "new", "words"),
    [
        (MIXTURE, ["oak"], ("evaluate.new: 'oak' is no client of the job", "ash, birch, cedar")),
        (None, ["ash"], ("evaluate.new: no stage has a pool", "key pool")),
        (MIXTURE, [{"name": "ash", "data": "ash.txt"}], ("the name 'ash' is given twice",)),
        (MIXTURE, list(CLIENTS), ("clients: ",)),
        (MIXTURE, [{"name": "gale", "data": "few.txt"}], ("few.txt", "4 windows of 16 tokens", "add text")),
    ],
    ids=lambda value: None,
)
def test_owners_who_cannot_be_kept_out_are_refused(small: Small, pool: Any, new: list[Any], words: tuple[str, ...]) -> None:
    (small.folder / "few.txt").write_text("a few words\n", encoding="utf-8")
    line = complaint("plan", small.job("bad", stages=tune(pool), evaluate__new=new))
    assert all(word in line for word in words), line


def test_a_federation_keeps_nobody_out_whose_text_it_has_not(small: Small) -> None:
    spec = small.spec(stages=tune(MIXTURE), evaluate={"new": ["cedar"]})
    spec["clients"] = [{"name": name} for name in CLIENTS]
    file = small.folder / "federated.toml"
    file.write_text(tomli_w.dumps(spec), encoding="utf-8")
    with pytest.raises(FedgroveError, match=r"evaluate\.new: in a federation .* `fedgrove adopt`"):
        load_federated(file)


def test_secure_aggregation_takes_gates_whose_members_add_up_over_enough_clients(small: Small) -> None:
    secure = {"privacy": {"secure_aggregation": True, "min_group": 2}}
    by_loss = {"gate": "losses", "members": 2, "windows": 2}
    line = complaint("plan", small.job("bad", stages=tune(by_loss, precision="fixed"), **secure))
    assert 'use gate = "keys"' in line
    line = complaint("plan", small.job("bad", stages=tune(GROUPS, precision="fixed"), **secure))
    assert "privacy.min_group" in line
    assert "make groups larger" in line
    line = complaint("plan", small.job("bad", stages=tune(OWN, precision="fixed"), **secure))
    assert "weighs what each client has changed, and a sum hides that" in line


def test_what_cannot_be_adopted_is_refused(small: Small, tmp_path: Path) -> None:
    run, new = small.undisturbed(stages=tune(MIXTURE)), small.texts["ash"]
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a b"}\n' * 3, encoding="utf-8")
    line = complaint("adopt", run, "--data", few, "--out", tmp_path / "mine")
    assert "few.jsonl" in line
    assert "4 windows of 16 tokens" in line
    assert "has no pool" in complaint("adopt", small.undisturbed(stages=tune(None)), "--data", new, "--out", tmp_path / "mine")
    other = make_model(tmp_path / "other", seed=1)
    line = complaint("adopt", run, "--data", new, "--out", tmp_path / "mine", "--model", other)
    assert "not the model that the pool was trained on (block-0000 differs)" in line
    line = complaint("adopt", run, "--data", new, "--out", tmp_path / "mine", "--prompt", "{text}")
    assert "--prompt and --answer: give both" in line
    tmp_path.joinpath("mine").mkdir()
    assert "exists already" in complaint("adopt", run, "--data", new, "--out", tmp_path / "mine")
    groups = small.undisturbed(stages=tune(GROUPS))
    assert "looks at no features" in complaint("gate", groups, "--data", new)
