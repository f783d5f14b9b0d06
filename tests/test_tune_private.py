"""Tuning in fixed-point numbers: secure sums with the bits of open ones, and noise that keeps its promise, once."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgrove import run as server
from fedgrove.client.serve import serve
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy import accounting
from fedgrove.privacy.secagg.masking import as_rings
from fedgrove.rounds import wire
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.runfolder import RunFolder
from fedgrove.stages.tune.changes import Start
from fedgrove.stages.tune.exchanges.train import Train
from fedgrove.stages.tune.factors import Factors, initial_a
from fedgrove.stages.tune.fixed_point import ClientNoise, FixedPointChanges
from fedgrove.stages.tune.parametrizations import lora
from fedgrove.stages.tune.train_settings import Training, WindowNoise
from fedgrove.stages.tune.trainers import sgd
from secagg import uniform
from small import CLIENTS, Moment, Small, cli, complaint, killed, measurements
from test_tune_stage import PRUNE, TUNE, client_of, clients_of, mean_perplexity, weights

WHOLE = {**TUNE, "aggregation": "ffa_lora", "precision": "fixed"}
SECURE = {"secure_aggregation": True}
FEDPIPE = {"method": "fedpipe", "ranks": [2, 4, 8], "batches": [1, 2], "deadline": 0.02, "importance_steps": 2}
UNEQUAL = [{"name": name, "speed": speed} for name, speed in zip(CLIENTS, (1.0, 4.0, 8.0), strict=True)]


class Recorder(LocalEngine):
    """Keeps what clients sent."""

    seen: list[tuple[str, str, bytes]]

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[Any]:
        for client, answer, error in super().request(kind, messages, timeout):
            if answer is not None:
                self.seen.append((client, kind, answer))
            yield client, answer, error


def run(small: Small, out: Path, engine: type[LocalEngine] = LocalEngine, **changes: Any) -> Path:
    job = load(small.job(out.name, **changes))
    begun = RunFolder(out, job)
    server.run_job(job, engine(clients_of(job, out / "clients")), begun)
    begun.close()
    return out


def train_request(**changes: Any) -> Train:
    """What a client is asked to do in a round; it need not be what a job would ask."""
    asked: dict[str, Any] = {
        "stage": 0, "parts": 0, "cut": None, "bits": 32, "length": 16, "seed": "s", "personal": 0.0,
        "parametrization": "lora", "trainer": "sgd", "shared_a": True, "ranks": {}, "scales": {}, "masked": (), "tokens": 352,
        "seen": 0, "dtype": "float32",
        "training": Training(
            steps=1, batch=1, micro=1, learning_rate=0.1, optimizer="adamw", max_grad_norm=0.0, proximal=0.0
        ),
    }  # fmt: skip
    return Train(**{**asked, **changes})


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values(), strict=True))


@pytest.mark.parametrize("method", ["lora", "fedpipe"])
def test_adapters_summed_unseen_are_those_summed_in_the_open(small: Small, tmp_path: Path, method: str) -> None:
    class Engine(Recorder):
        seen = []  # noqa: RUF012

    change = FEDPIPE if method == "fedpipe" else {}
    easy = small.one_word()
    clients = [{**mine, **client} for mine, client in zip(UNEQUAL, easy["clients"], strict=True)]
    spec = {**easy, "stages": [{**WHOLE, **change}], "clients": clients}
    hidden = run(small, tmp_path / "hidden", Engine, privacy={**SECURE, "min_group": 2}, **spec)
    plan = json.loads((hidden / "plan-0-tune.json").read_text())
    ranks = [share["ranks"] for share in plan["clients"].values()]
    for linear in {name for mine in ranks for name in mine}:
        most = max(mine.get(linear, 0) for mine in ranks)
        assert sum(mine.get(linear, 0) == most for mine in ranks) >= 2  # nobody is alone in a column
    if method == "lora":
        assert same(hidden, run(small, tmp_path / "open", **spec))
        assert mean_perplexity(hidden, 0) < 0.5 * mean_perplexity(hidden, None)
    found = measurements(hidden)
    assert {client for _, _, client, name in found if name == "loss"} == {None}
    answers = [wire.unpack(message)[0] for _, kind, message in Engine.seen if kind in ("tune/train", "tune/importance")]
    assert len(answers) == len(CLIENTS) * (3 if method == "fedpipe" else 2)
    assert uniform(np.concatenate([ring.view(np.uint8) for tensors in answers for ring in as_rings(tensors)]))


def test_whole_numbers_are_as_good_as_floats(small: Small) -> None:
    fixed = small.undisturbed(stages=[WHOLE])
    floats = small.undisturbed(stages=[{**WHOLE, "precision": "float32"}])
    assert mean_perplexity(fixed, 0) == pytest.approx(mean_perplexity(floats, 0), rel=1e-4)
    loss, other = (measurements(out)[0, 1, None, "loss"] for out in (fixed, floats))
    assert loss == pytest.approx(other, rel=1e-5)


def test_a_pruned_model_is_tuned_unseen_and_keeps_its_zeros(small: Small) -> None:
    done = small.undisturbed(stages=[PRUNE, WHOLE], privacy=SECURE)
    for row in json.loads((done / "pruning.json").read_text())["tensors"]:
        assert int((weights(done)[row["name"]] == 0).sum()) == row["pruned"]


def test_a_client_of_lower_rank_computes_with_the_rows_of_the_shared_factor(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a client does not train of a shared A lies behind what it trains, not in its place."""
    name = "model.layers.0.mlp.up_proj"
    job = load(small.job("rest", stages=[{**WHOLE, "steps": 1}]))
    ash = client_of(job, small.folder / "rest-clients", "ash")
    torch.manual_seed(0)
    shape = Decoder(Checkpoint(small.model)).read_shape(name)
    b = 0.1 * torch.randn(shape[0], 4)
    seen: dict[str, Start[Factors]] = {}

    def note(model: Any, starts: Mapping[str, Start[Factors]], how: Any) -> None:
        seen.update(starts)
        raise FedgroveError("seen enough")

    request = train_request(ranks={name: 2}, scales={name: 2.0})
    tensors = {f"own/{name}/b": b[:, :2].contiguous(), f"rest/{name}/b": b[:, 2:].contiguous()}
    monkeypatch.setattr(lora, "attach", note)
    with pytest.raises(FedgroveError, match="seen enough"):
        serve(request.KIND, wire.pack(tensors, {"request": request.model_dump(mode="json")}), ash, "cpu")
    a = initial_a(name, 4, shape[1], "s")
    torch.testing.assert_close(seen[name].own.plus(seen[name].rest).product(), Factors(b, a).product())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": [TUNE], "privacy": SECURE}, 'set aggregation = "ffa_lora" and precision = "fixed"'),
        ({"stages": [{**TUNE, "precision": "fixed"}]}, 'set aggregation = "ffa_lora"'),
        ({"stages": [{**TUNE, "epsilon": 1.0, "method": "fedpipe"}]}, 'set method = "lora"'),
        ({"stages": [{**TUNE, "epsilon": 1.0, "dp_unit": "client"}]}, '"ffa_lora" and precision = "fixed"'),
        ({"stages": [{**WHOLE, "epsilon": 0.01, "dp_unit": "client"}]}, "raise epsilon, or lower dp_clip"),
        ({"stages": [PRUNE, {**TUNE, "epsilon": 1.0}], "evaluate__alone": True}, "evaluate.alone: the clients' own models"),
        ({"stages": [{**WHOLE, **FEDPIPE}], "privacy": SECURE, "clients__0__memory": "1MiB"}, "to hide one"),
    ],
)
def test_what_cannot_be_promised_is_refused(small: Small, changes: dict[str, Any], says: str) -> None:
    assert says in complaint("plan", small.job("refused", **changes))


def test_without_the_accountant_there_is_one_line(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "dp_accounting" else find(name, *rest))
    accounting.dp_sgd_epsilon.cache_clear()
    accounting.dp_sgd_noise_multiplier.cache_clear()
    job = small.job("unaccounted", stages=[{**TUNE, "epsilon": 1.0}], evaluate={})
    assert 'pip install "fedgrove[privacy]"' in complaint("plan", job)


def test_a_killed_run_with_noise_goes_on_and_draws_nothing_twice(small: Small, tmp_path: Path) -> None:
    stage = {**WHOLE, "epsilon": 8.0, "delta": 1e-3, "dp_unit": "client", "steps": 1}
    job = small.job("killed", stages=[stage], evaluate={}, privacy=SECURE)
    out = tmp_path / "run"
    first, last = (Moment("os.rename", f"*changes-000{round_}.safetensors") for round_ in (0, 1))

    def released() -> dict[str, bytes]:
        return {file.parent.name: file.read_bytes() for file in out.rglob("released-*.safetensors")}

    killed("run", job, "--out", out, "--quiet", moment=first)  # the sum was opened, and is lost
    drawn = released()
    assert sorted(drawn) == sorted(CLIENTS)
    killed("run", job, "--out", out, "--quiet", "--resume", moment=first)
    assert released() == drawn  # asked again, the clients gave the same numbers
    killed("run", job, "--out", out, "--quiet", "--resume", moment=last)
    assert not set(released().values()) & set(drawn.values())
    for client in CLIENTS:
        assert len(json.loads((out / "clients" / client / "released.json").read_text())) == 2
    assert cli("run", job, "--out", out, "--quiet", "--resume")[0] == 0


def test_a_client_asked_past_its_rounds_refuses(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = load(small.job("past", stages=[{**WHOLE, "epsilon": 8.0, "dp_unit": "client"}], evaluate={}))
    ash = client_of(job, tmp_path, "ash")
    noise = ClientNoise(epsilon=8.0, delta=1e-6, clip=1.0, rounds=2, adders=2)
    request = train_request(round=2, fixed=FixedPointChanges(everything=3, most=999, widest={}, noise=noise))
    monkeypatch.setattr(sgd, "train", lambda *rest: 1.0)
    with pytest.raises(FedgroveError, match="'ash': round 3 of 2: its privacy budget is spent"):
        serve(request.KIND, wire.pack({}, {"request": request.model_dump(mode="json")}), ash, "cpu")


def test_a_noisy_response_is_named_by_its_round_so_that_it_is_made_once() -> None:
    noise = ClientNoise(epsilon=8.0, delta=1e-6, clip=1.0, rounds=2, adders=2)
    fixed = FixedPointChanges(everything=3, most=999, widest={}, noise=noise)
    windows = WindowNoise(epsilon=8.0, delta=1e-6, noise=1.0, rounds=2, clip=1.0)
    for protected in ({"fixed": fixed}, {"windows": windows, "trainer": "dp_sgd"}):
        names = {train_request(stage=stage, round=round_, **protected).release() for stage in (0, 1) for round_ in (0, 1)}
        assert names == {"0/0", "0/1", "1/0", "1/1"}
        other = train_request(seen=5, seed="t", ranks={"x": 2}, tokens=3, **protected)
        assert other.release() == "0/0", "asked otherwise for the same round, it gives the same response"
    assert train_request(fixed=FixedPointChanges(everything=999, most=999, widest={})).release() is None


def test_a_client_that_is_given_too_little_noise_is_named_and_trains_nothing(small: Small, tmp_path: Path) -> None:
    job = load(small.job("little", stages=[{**TUNE, "epsilon": 8.0}], evaluate={}))
    windows = WindowNoise(epsilon=1.0, delta=1e-5, noise=0.01, rounds=1, clip=1.0)
    request = train_request(trainer="dp_sgd", shared_a=False, windows=windows)
    with pytest.raises(FedgroveError, match=r"client 'ash': noise of 0\.01 is too little for epsilon = 1; training refused"):
        serve(request.KIND, wire.pack({}, {"request": request.model_dump(mode="json")}), client_of(job, tmp_path, "ash"), "cpu")


@pytest.mark.parametrize(
    ("change", "privacy", "says"),
    [
        ({"dp_unit": "window", "epsilon": 1.0}, {}, "privacy of one window of 16 tokens of one client"),
        ({**WHOLE, "dp_unit": "client"}, {}, "but not towards the server"),
        ({**WHOLE, "dp_unit": "client"}, SECURE, "at least 2 clients add their part"),
    ],
)
def test_what_is_promised_is_said_and_no_loss_leaves(
    small: Small, tmp_path: Path, change: dict[str, Any], privacy: dict[str, Any], says: str
) -> None:
    class Engine(Recorder):
        seen = []  # noqa: RUF012

    stages = [{**TUNE, "epsilon": 20.0, "delta": 1e-3, **change}]
    clients = [{"name": name, "data": str(small.texts["ash"])} for name in CLIENTS]  # as much text: one calibration for all
    spec = {"stages": stages, "clients": clients, "evaluate": {}, "privacy": privacy}
    status, told, _ = cli("plan", small.job("said", **spec))
    assert status == 0
    assert says in " ".join(told.split())
    out = run(small, tmp_path / "said", Engine, **spec)
    (note,) = json.loads((out / "plan-0-tune.json").read_text())["notes"]
    assert says in note
    page = html.unescape((out / "report.html").read_text())
    assert note in page
    assert Disclosure.FACTORS.sentence in page
    assert Disclosure.LOSS.sentence not in page
    assert not any(name == "loss" for _, _, _, name in measurements(out))
    for _, kind, message in Engine.seen:
        tensors, info = wire.unpack(message)
        if kind == "tune/train":
            assert set(info) == {"request", "tokens", "loss"}
            assert info["loss"] is None
            assert not any("loss" in name for name in tensors)


def test_a_stage_beside_it_without_noise_is_named(small: Small) -> None:
    stages = [PRUNE, {**TUNE, "epsilon": 8.0, "batches": [64]}]
    _, told, _ = cli("plan", small.job("beside", stages=stages, evaluate={}))
    assert "Stage 0 uses the same text without noise" in " ".join(told.split())
