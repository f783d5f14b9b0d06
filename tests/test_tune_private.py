"""Tuning in whole numbers: unseen sums with the bits of open ones, and noise that keeps its promise, once."""

from __future__ import annotations

import html
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgrove import run as server
from fedgrove.client.serve import serve
from fedgrove.data import IGNORED
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load as jobs
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy import tuning as dp
from fedgrove.privacy.noise import agreed, multiplier, once
from fedgrove.privacy.secure import as_rings
from fedgrove.rounds import wire
from fedgrove.runfolder import RunFolder
from fedgrove.stages.tune import fixed_point as whole
from fedgrove.stages.tune import training
from fedgrove.stages.tune.changes import Start
from fedgrove.stages.tune.factors import Factors, initial_a
from fedgrove.stages.tune.parametrizations import lora
from fedgrove.stages.tune.trainers import dp_sgd as private
from small import CLIENTS, Moment, Small, cli, complaint, killed, measurements
from test_secure import uniform
from test_tune_stage import PRUNE, TUNE, mean_perplexity, weights

WHOLE = {**TUNE, "aggregation": "ffa_lora", "precision": "fixed"}
SECURE = {"secure_aggregation": True}
FEDPIPE = {"method": "fedpipe", "ranks": [2, 4, 8], "batches": [1, 2], "deadline": 0.02}
UNEQUAL = [{"name": name, "speed": speed} for name, speed in zip(CLIENTS, (1.0, 4.0, 8.0), strict=True)]


class Recorder(LocalEngine):
    """Keeps what clients sent."""

    seen: list[tuple[str, str, bytes]]

    def ask(self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None) -> Iterator[Any]:
        for client, answer, error in super().ask(kind, messages, timeout):
            if answer is not None:
                self.seen.append((client, kind, answer))
            yield client, answer, error


def run(small: Small, out: Path, engine: type[LocalEngine] = LocalEngine, **changes: Any) -> Path:
    job = jobs.load(small.job(out.name, **{"evaluate__alone": False, **changes}))
    begun = RunFolder(out, job)
    sites = server.local_engine(job, out / "clients")._sites
    server.run_job(job, engine(list(sites.values())), begun)
    begun.close()
    return out


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values(), strict=True))


@pytest.mark.parametrize("method", ["lora", "fedpipe"])
def test_adapters_summed_unseen_are_those_summed_in_the_open(small: Small, tmp_path: Path, method: str) -> None:
    class Engine(Recorder):
        seen = []  # noqa: RUF012

    change = FEDPIPE if method == "fedpipe" else {}
    clients = [{**mine, "data": str(small.texts[mine["name"]])} for mine in UNEQUAL]
    spec = {"stages": [{**WHOLE, **change}], "clients": clients}
    hidden = run(small, tmp_path / "hidden", Engine, privacy={**SECURE, "min_group": 2}, **spec)
    plan = json.loads((hidden / "plan-0-tune.json").read_text())
    ranks = [share["ranks"] for share in plan["clients"].values()]
    for linear in {name for mine in ranks for name in mine}:
        most = max(mine.get(linear, 0) for mine in ranks)
        assert sum(mine.get(linear, 0) == most for mine in ranks) >= 2  # nobody is alone in a column
    if method == "lora":
        assert same(hidden, run(small, tmp_path / "open", **spec))
        assert mean_perplexity(hidden, 0) < mean_perplexity(hidden, None)
    found = measurements(hidden)
    assert {client for _, _, client, name in found if name == "loss"} == {None}
    answers = [wire.unpack(message)[0] for _, kind, message in Engine.seen if kind in ("train", "importance")]
    assert len(answers) == len(CLIENTS) * (3 if method == "fedpipe" else 2)
    assert uniform(np.concatenate([ring.view(np.uint8) for tensors in answers for ring in as_rings(tensors)]))


def test_whole_numbers_are_as_good_as_floats(small: Small) -> None:
    fixed = small.undisturbed(stages=[WHOLE])
    floats = small.undisturbed(stages=[{**WHOLE, "precision": "float32"}])
    assert mean_perplexity(fixed, 0) == pytest.approx(mean_perplexity(floats, 0), rel=1e-4)
    loss, other = (measurements(out)[0, 1, None, "loss"] for out in (fixed, floats))
    assert loss == pytest.approx(other, rel=1e-5)


def test_a_pruned_model_is_tuned_unseen_and_keeps_its_zeros(small: Small) -> None:
    done = small.undisturbed(stages=[PRUNE, WHOLE], evaluate__alone=False, privacy=SECURE)
    for row in json.loads((done / "pruning.json").read_text())["tensors"]:
        assert int((weights(done)[row["name"]] == 0).sum()) == row["pruned"]


def test_a_client_of_lower_rank_computes_with_the_rows_of_the_shared_factor(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a client does not train of a shared A lies behind what it trains, not in its place."""
    name = "model.layers.0.mlp.up_proj"
    job = jobs.load(small.job("rest", stages=[{**WHOLE, "steps": 1}]))
    engine = server.local_engine(job, small.folder / "rest-clients")
    torch.manual_seed(0)
    shape = Decoder(Checkpoint(small.model)).read_shape(name)
    b = 0.1 * torch.randn(shape[0], 4)
    seen: dict[str, Start] = {}

    def note(model: Any, starts: Mapping[str, Start], *rest: Any) -> None:
        seen.update(starts)
        raise FedgroveError("seen enough")

    info = {
        "stage": 0, "parts": 0, "width": None, "personal": 0.0, "round": 0,
        "bits": 32, "length": 16, "seed": "s", "seen": 0, "masked": [], "ranks": {name: 2},
        "scales": {name: 2.0}, "trains": "b", "precision": "float32", "settings": {"steps": 1, "batch": 1, "micro": 1,
        "learning_rate": 0.0},
    }  # fmt: skip
    tensors = {f"own/{name}/b": b[:, :2].contiguous(), f"rest/{name}/b": b[:, 2:].contiguous()}
    monkeypatch.setattr(lora, "attach", note)
    with pytest.raises(FedgroveError, match="seen enough"):
        serve("train", wire.pack(tensors, info), engine._sites["ash"], "cpu")
    a = initial_a(name, 4, shape[1], "s")
    torch.testing.assert_close(seen[name].own.plus(seen[name].rest).product(), Factors(b, a).product())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": [TUNE], "privacy": SECURE}, 'set aggregation = "ffa_lora" and precision = "fixed"'),
        ({"stages": [{**TUNE, "precision": "fixed"}]}, 'set aggregation = "ffa_lora"'),
        ({"stages": [{**TUNE, "epsilon": 1.0, "method": "fedpipe"}]}, 'set method = "lora"'),
        ({"stages": [{**TUNE, "epsilon": 1.0, "dp_unit": "client"}]}, 'precision = "fixed" beside it'),
        ({"stages": [{**WHOLE, "epsilon": 0.01, "dp_unit": "client"}]}, "raise epsilon, or lower dp_clip"),
        ({"stages": [PRUNE, {**TUNE, "epsilon": 1.0}], "evaluate__alone": True}, "evaluate.alone: what a client"),
        ({"stages": [{**WHOLE, **FEDPIPE}], "privacy": SECURE, "clients__0__memory": "1MiB"}, "to hide one"),
    ],
)
def test_what_cannot_be_promised_is_refused(small: Small, changes: dict[str, Any], says: str) -> None:
    assert says in complaint("plan", small.job("refused", **{"evaluate__alone": False, **changes}))


def test_without_the_accountant_there_is_one_line(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "dp_accounting" else find(name, *rest))
    dp.spent.cache_clear()
    dp.window_noise.cache_clear()
    job = small.job("unaccounted", stages=[{**TUNE, "epsilon": 1.0}], evaluate={})
    assert 'pip install "fedgrove[privacy]"' in complaint("plan", job)


# How much noise


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (0.7, 0.5), (2.0, 1.0)])
def test_a_step_spends_what_its_definition_says(noise: float, rate: float) -> None:
    x = torch.linspace(-15 * noise, 15 * noise + 1, 100_001, dtype=torch.float64)

    def density(mean: float) -> torch.Tensor:
        return torch.exp(-((x - mean) ** 2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))

    without, with_it = density(0.0), (1 - rate) * density(0.0) + rate * density(1.0)

    def delta(epsilon: float) -> float:  # the larger of both directions
        pairs = ((with_it, without), (without, with_it))
        return max(float(torch.trapezoid((p - math.exp(epsilon) * q).clamp(min=0), x)) for p, q in pairs)

    epsilon = dp.spent(noise, rate, 1, 1e-4)
    assert delta(epsilon * 1.001) <= 1e-4
    assert delta(epsilon * 0.98) > 1e-4


def test_many_steps_without_sampling_are_one_gaussian() -> None:
    noise = dp.client_noise(3.0, 1e-5, 16)
    assert noise == pytest.approx(4 * multiplier(3.0, 1e-5))
    assert dp.spent(noise, 1.0, 16, 1e-5) == pytest.approx(3.0, rel=2e-3)
    assert dp.window_noise(3.0, 1e-5, 1.0, 16) == noise
    assert dp.window_noise(3.0, 1e-5, 0.99, 16) == pytest.approx(noise, rel=0.02)


def test_the_noise_is_gaussian_and_whole() -> None:
    drawn = dp.gaussian(400_001, 3.0)
    assert len(drawn) == 400_001
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(3.0, rel=0.01)
    assert float((drawn.abs() < 3.0).double().mean()) == pytest.approx(0.6827, abs=0.004)
    noisy = dp.add_whole({"b": torch.zeros(100, 100, dtype=torch.int32)}, 1000.0)["b"]
    assert noisy.dtype == torch.int32
    assert float(noisy.double().std()) == pytest.approx(1000, rel=0.05)


def test_changes_are_clipped_together_and_rounded_towards_zero() -> None:
    torch.manual_seed(0)
    changes = {"a": torch.randn(5, 3), "b": torch.randn(7, 2)}
    clipped = dp.clipped(changes, 0.5)
    sent = whole.encode(clipped, 1.0)
    norm = math.sqrt(sum(float((value.double() * 2.0**-whole.BITS).square().sum()) for value in sent.values()))
    assert 0.4999 < norm <= 0.5
    quiet = {name: 1e-3 * value for name, value in changes.items()}
    torch.testing.assert_close(dp.clipped(quiet, 0.5)["a"], quiet["a"].double())
    assert not any(value.any() for value in dp.clipped({**changes, "b": changes["b"] / 0}, 0.5).values())
    with pytest.raises(FedgroveError, match="lower learning_rate"):
        whole.encode({"a": torch.tensor([math.nan])}, 1.0)


class Line(torch.nn.Module):
    """A model of one matrix: logits of each token are a row of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(6, 6))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.table[input_ids]})


def test_no_window_moves_a_step_by_more_than_the_bound_and_the_noise_is_that_of_the_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.randint(6, (5, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[4] = IGNORED
    steps: list[torch.Tensor] = []

    def learnt(ids: torch.Tensor, labels: torch.Tensor, noise: float, bound: float) -> torch.Tensor:
        model = Line()
        settings = training.Settings(1, len(ids), 1, 1.0, optimizer="sgd")  # a step of 1: the weight is minus the gradient
        private.train(
            model, ids, labels, settings, client="ash", epsilon=50.0, delta=0.05, noise=noise, rounds=1, bound=bound
        )  # fmt: skip
        return -model.table.detach() * len(ids)

    monkeypatch.setattr(private, "enough", lambda *facts: True)
    alone = [learnt(ids[i : i + 1], labels[i : i + 1], 0.0, 0.2) for i in range(5)]
    assert [round(float(gradient.norm()), 4) for gradient in alone] == [0.2, 0.2, 0.2, 0.2, 0.0]
    torch.testing.assert_close(learnt(ids, labels, 0.0, 0.2), torch.stack(alone).sum(0), atol=1e-6, rtol=1e-4)
    steps = [learnt(ids[4:], labels[4:], 3.0, 0.2) for _ in range(200)]  # nothing but noise
    assert float(torch.stack(steps).std()) == pytest.approx(0.6, rel=0.05)


def test_a_client_trains_nothing_with_less_noise_than_was_promised() -> None:
    ids = torch.zeros(20, 8, dtype=torch.int64)
    enough = dp.window_noise(1.0, 1e-5, 0.1, 10)
    for noise, rounds in ((0.9 * enough, 10), (enough, 20)):
        with pytest.raises(FedgroveError, match="'ash': noise of"):
            private.train(
                Line(), ids, ids, training.Settings(1, 2, 1, 0.1), client="ash", epsilon=1.0, delta=1e-5, noise=noise,
                rounds=rounds, bound=1.0,
            )  # fmt: skip


def test_windows_take_part_by_chance_as_often_as_was_counted() -> None:
    counts = torch.zeros(50)
    for _ in range(2000):
        counts[dp.picked(50, 0.1)] += 1
    assert float(counts.mean()) == pytest.approx(200, rel=0.03)
    assert float(counts.var()) == pytest.approx(2000 * 0.1 * 0.9, rel=0.6)


# Once


def test_a_noisy_answer_is_made_once_and_given_again(tmp_path: Path) -> None:
    drawn = iter(range(9))

    def make() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"x": torch.tensor([next(drawn)])}, {"stage": 0}

    first = once(tmp_path, "run/0/1", "ash", make)
    assert once(tmp_path, "run/0/1", "ash", make) == first == ({"x": torch.tensor([0])}, {"stage": 0})
    agreed(tmp_path, "run/0/1", "ash", ["ash", "birch", "cedar"])
    agreed(tmp_path, "run/0/1", "ash", ["ash", "birch", "cedar"])
    with pytest.raises(FedgroveError, match="'ash': its noisy answer is in a sum of other clients"):
        agreed(tmp_path, "run/0/1", "ash", ["ash", "birch"])
    assert once(tmp_path, "run/0/2", "ash", make)[0]["x"] == 1
    with pytest.raises(FedgroveError, match="'ash': it has released this once"):
        once(tmp_path, "run/0/1", "ash", make)


def test_a_killed_run_with_noise_goes_on_and_draws_nothing_twice(small: Small, tmp_path: Path) -> None:
    stage = {**WHOLE, "epsilon": 8.0, "delta": 1e-3, "dp_unit": "client", "steps": 1}
    job = small.job("killed", stages=[stage], evaluate={}, privacy=SECURE)
    out = tmp_path / "run"
    first, last = (Moment("os.rename", f"*adapters-000{round_}.safetensors") for round_ in (0, 1))

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
    job = jobs.load(small.job("past", stages=[{**WHOLE, "epsilon": 8.0, "dp_unit": "client"}], evaluate={}))
    site = server.local_engine(job, tmp_path)._sites["ash"]
    noise = {"epsilon": 8.0, "delta": 1e-6, "bound": 1.0, "rounds": 2, "adders": 2}
    info = {
        "stage": 0, "parts": 0, "width": None, "personal": 0.0, "round": 2,
        "bits": 32, "length": 16, "seed": "s", "seen": 0, "masked": [], "ranks": {}, "scales": {},
        "trains": "b", "precision": "float32", "settings": {"steps": 0, "batch": 1, "micro": 1, "learning_rate": 0.0},
        "whole": {"share": 1 / 3, "ranks": {}, "noise": noise}, "release": "run/0/2",
    }  # fmt: skip
    monkeypatch.setattr(lora, "train", lambda *rest: 1.0)
    with pytest.raises(FedgroveError, match="'ash': round 3 of 2: its budget is spent"):
        serve("train", wire.pack({}, info), site, "cpu")
    with pytest.raises(FedgroveError, match="'ash': a noisy answer that is not named"):
        serve("train", wire.pack({}, {**info, "release": None}), site, "cpu")


@pytest.mark.parametrize(
    ("change", "privacy", "says"),
    [
        ({"dp_unit": "window"}, {}, "privacy of one window of 16 tokens of one client"),
        ({**WHOLE, "dp_unit": "client"}, {}, "but not towards the server"),
        ({**WHOLE, "dp_unit": "client"}, SECURE, "at least 2 clients adding their part"),
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
    out = run(small, tmp_path / "said", Engine, **{**spec, "evaluate__alone": False})
    (note,) = json.loads((out / "plan-0-tune.json").read_text())["notes"]
    assert says in note
    assert note in html.unescape((out / "report.html").read_text())
    assert not any(name == "loss" for _, _, _, name in measurements(out))
    for _, kind, message in Engine.seen:
        tensors, info = wire.unpack(message)
        assert kind != "train" or (not info and not any("loss" in name for name in tensors))


def test_a_stage_beside_it_without_noise_is_named(small: Small) -> None:
    stages = [PRUNE, {**TUNE, "epsilon": 8.0, "batches": [64]}]
    _, told, _ = cli("plan", small.job("beside", stages=stages, evaluate={}))
    assert "Stage 0 uses the same text without noise" in " ".join(told.split())
