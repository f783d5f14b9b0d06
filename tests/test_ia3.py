"""(IA)³: scales that merge exactly, and what every parametrization without ranks shares with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedgrove.client.windows import training_windows
from fedgrove.engines.local import LocalEngine
from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds import wire
from fedgrove.stages.tune import frozen, training
from fedgrove.stages.tune.changes import Change, Start
from fedgrove.stages.tune.factors import Factors
from fedgrove.stages.tune.parametrizations import Attachment, full, ia3, parametrization_of
from fedgrove.stages.tune.server_optimizers import ServerOptimizerState, step
from fedgrove.stages.tune.trainers import sgd
from small import CLIENTS, LENGTH, Moment, Small, cli, lines, measurements
from test_architectures import save
from test_tune_stage import PRUNE, TUNE, client_of, mean_perplexity, weights

IA3 = {**TUNE, "method": "ia3", "learning_rate": 0.05}
SECURE = {"secure_aggregation": True}
BOTH = pytest.mark.parametrize("method", ["ia3", "full"])


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt"])
def test_the_merged_model_has_the_logits_of_the_hooked_one(name: str, tmp_path: Path, grove: Path) -> None:
    """With and without biases, and where a weight lies transposed (GPT-2)."""
    folder = save(name, tmp_path / "model", grove, torch.float32)
    decoder = Decoder(Checkpoint(folder))
    shapes = {linear: decoder.read_shape(linear) for linear in decoder.linear_names()}
    torch.manual_seed(0)
    scales = {linear: ia3.Scales(0.3 * torch.randn(shape[0])) for linear, shape in shapes.items()}
    plain, hooked, merged = (frozen.load(Decoder(Checkpoint(folder)), 32).eval() for _ in range(3))
    ia3.attach(hooked, {linear: Start(s, ia3.none(shapes[linear])) for linear, s in scales.items()}, Attachment({}, {}))
    for linear, change in scales.items():
        module = merged.get_submodule(linear)
        module.weight.data = as_matrix(module, ia3.merge(decoder.read_matrix(linear), change, masked=False)).contiguous()
    ids = torch.randint(0, 4000, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = logits(hooked, ids)
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
    assert (expected - logits(plain, ids)).norm() > 0.05 * expected.norm(), "the scales do something"


def test_scales_that_are_all_one_change_no_bit(small: Small) -> None:
    decoder = Decoder(Checkpoint(small.model))
    for name in decoder.linear_names():
        weight = decoder.read_matrix(name)
        assert torch.equal(ia3.merge(weight, ia3.none(decoder.read_shape(name)), masked=False), weight)
        assert torch.equal(ia3.merge(weight, ia3.Scales(torch.zeros(len(weight))), masked=False), weight)


@pytest.mark.parametrize("masked", [False, True])
def test_a_scaled_zero_is_zero_and_under_a_mask_nothing_else_becomes_one(masked: bool) -> None:
    weight = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.0, 1e-38]])
    got = ia3.merge(weight, ia3.Scales(torch.tensor([0.5, -1.0])), masked)
    assert got[0].tolist() == [0.0, 1.5, -3.0]
    assert got[1].tolist() == (weight[1].tolist() if masked else [0.0, 0.0, 0.0])


def test_it_tunes_and_the_result_loads_anywhere(small: Small) -> None:
    run = small.undisturbed(stages=[{**IA3, "rounds": 3, "steps": 4}], **small.one_word())
    assert mean_perplexity(run, 0) < 0.5 * mean_perplexity(run, None)
    before, after = weights(small.undisturbed(**small.one_word(), stages=[PRUNE])), weights(run)
    assert before.keys() == after.keys()
    original = Checkpoint(small.model)
    for name, tensor in after.items():
        assert torch.equal(tensor, original.read(name)) == ("proj" not in name), name
        if "proj" in name:  # each row is a multiple of what it was, but for the rounding to bfloat16
            rows = original.read(name).double()
            factors = (tensor.double() * rows).sum(1) / rows.square().sum(1)
            torch.testing.assert_close(tensor.double(), factors[:, None] * rows, rtol=2**-7, atol=1e-3)
    tuned, plain = (AutoModelForCausalLM.from_pretrained(of, dtype=torch.float32) for of in (run / "model", small.model))
    ids = torch.arange(40)[None] + 300
    expected = logits(tuned, ids)
    got = logits(PeftModel.from_pretrained(plain, str(run / "adapter")), ids)
    assert (got - expected).norm() < 0.02 * expected.norm(), "but for the rounding of the merged weights to bfloat16"


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_frozen_base_may_have_fewer_bits(small: Small, bits: int) -> None:
    if bits < 16:
        pytest.importorskip("bitsandbytes")
    run = small.undisturbed(stages=[{**IA3, "bits": [bits], "rounds": 3, "steps": 4}], **small.one_word())
    assert mean_perplexity(run, 0) < 0.5 * mean_perplexity(run, None)


def test_zeros_of_a_pruned_model_stay(small: Small) -> None:
    changes = small.one_word()
    pruned = weights(small.undisturbed(stages=[PRUNE], **changes))
    run = small.undisturbed(stages=[PRUNE, {**IA3, "rounds": 3, "steps": 4}], **changes)
    after = weights(run)
    for row in json.loads((run / "pruning.json").read_text())["tensors"]:
        assert torch.equal(pruned[row["name"]] == 0, after[row["name"]] == 0)
        assert int((after[row["name"]] == 0).sum()) == row["pruned"] == row["numel"] // 2
        assert not torch.equal(pruned[row["name"]], after[row["name"]])
    assert mean_perplexity(run, 1) < 0.5 * mean_perplexity(run, 0)


@BOTH
def test_one_client_alone_is_training_it_locally(small: Small, method: str) -> None:
    """Two rounds of a federation of one, and the same steps on the same windows without any."""
    stages = [{**IA3, "method": method, "learning_rate": 0.01, "precision": "float32"}]
    clients = [{"name": "ash", "data": str(small.texts["ash"])}]
    changes = {"stages": stages, "clients": clients, "evaluate": {}, "model__dtype": "float32"}
    run = small.undisturbed(**changes)
    windows = training_windows(client_of(load(run / "job.toml"), small.folder / "alone", "ash"), LENGTH)
    decoder = Decoder(Checkpoint(small.model, torch.float32))
    way = parametrization_of(method)
    shapes = {name: decoder.read_shape(name) for name in decoder.linear_names()}
    learnt = {name: way.none(shape) for name, shape in shapes.items()}
    for round_ in range(2):
        starts = {name: way.start(learnt[name].parts(), {}, shape, 1, name, "0/0") for name, shape in shapes.items()}
        model = frozen.load(Decoder(Checkpoint(small.model, torch.float32)), 32)
        masks = way.attach(model, starts, Attachment({}, {}))
        work = training.Work(*windows, seen=round_ * 8, seed="0/0/ash", masks=masks)
        sgd.train(model, work, training.Settings(2, 4, 4, 0.01, max_grad_norm=1.0))
        trained = way.detach(model, list(shapes), starts)
        learnt = {name: way.total(trained[name], starts[name]) for name in shapes}
    got = weights(run)
    for name in shapes:
        before = decoder.read_matrix(name)
        assert (got[f"{name}.weight"] - before).abs().max() > 1e-4
        torch.testing.assert_close(got[f"{name}.weight"], way.merge(before, learnt[name], masked=False), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("method", "optimizer"), [("full", "average"), ("ia3", "momentum")])
def test_whole_numbers_are_the_open_sum_and_the_same_bits_unseen(small: Small, method: str, optimizer: str) -> None:
    stage = {
        **IA3, "method": method, "learning_rate": 0.01, "optimizer": "sgd", "max_grad_norm": 0.0, "server_optimizer": optimizer
    }  # fmt: skip
    common = {"evaluate": {}, "model__dtype": "float32"}
    floats = small.undisturbed(stages=[{**stage, "precision": "float32"}], **common)
    whole = small.undisturbed(stages=[{**stage, "precision": "fixed"}], **common)
    unseen = small.undisturbed(stages=[{**stage, "precision": "fixed"}], privacy=SECURE, **common)
    before, wanted = (weights(run) for run in (small.undisturbed(stages=[PRUNE], **common), floats))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(unseen)[name]), name
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-5)
        assert "proj" not in name or not torch.equal(tensor, before[name])
    if optimizer != "average":
        plain = weights(small.undisturbed(stages=[{**stage, "precision": "fixed", "server_optimizer": "average"}], **common))
        assert any(not torch.equal(tensor, plain[name]) for name, tensor in weights(whole).items())
    losses = [measurements(run)[0, 1, None, "loss"] for run in (floats, whole, unseen)]
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert {client for _, _, client, name in measurements(whole) if name == "loss"} == {None}


@BOTH
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_every_server_optimizer_tunes(small: Small, method: str, optimizer: str) -> None:
    stage = {**IA3, "method": method, "rounds": 3, "steps": 4, "server_optimizer": optimizer}
    if optimizer == "adam":
        stage["server_lr"] = 0.1 if method == "ia3" else 0.01
    if method == "full":
        stage["learning_rate"] = 1e-3  # a client refuses weights that grew to twice their norm
    run = small.undisturbed(stages=[stage], **small.one_word())
    assert mean_perplexity(run, 0) < 0.5 * mean_perplexity(run, None)


CHANGES: dict[str, tuple[Change, Change]] = {
    "factors": (Factors.none(12, 9), Factors(torch.randn(12, 3).double(), torch.randn(3, 9).double())),
    "dense": (full.Dense(), full.Dense(torch.randn(12, 9))),
    "scales": (ia3.none((12, 9)), ia3.Scales(torch.randn(12).double())),
}


def values(change: Change) -> Tensor:
    """The numbers that a change consists of, as far as they add up."""
    return change.product() if isinstance(change, Factors) else next(iter(change.parts().values()))


@pytest.mark.parametrize("form", CHANGES)
def test_the_first_step_of_adam_is_as_long_for_every_form_of_change_and_size(form: str) -> None:
    none, direction = CHANGES[form]
    for size in (1e-2, 1e2):
        new = direction.scaled(size)
        got, _ = step("adam", none, new, ServerOptimizerState(none), 1e-3, 9)
        torch.testing.assert_close(float(values(got).double().square().mean().sqrt()), 1e-3, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("form", CHANGES)
def test_momentum_goes_on_and_a_rate_takes_part_of_the_way(form: str) -> None:
    none, new = CHANGES[form]
    first, remembered = step("momentum", none, new, ServerOptimizerState(none), None, 9)
    torch.testing.assert_close(values(first), values(new))
    second, _ = step("momentum", first, first, remembered, None, 9)
    torch.testing.assert_close(values(second), 1.9 * values(new))
    half, _ = step("average", none, new, ServerOptimizerState(none), 0.5, 9)
    torch.testing.assert_close(values(half), 0.5 * values(new))


@pytest.mark.parametrize(("method", "moment"), [
    ("ia3", Moment("os.rename", "*/changes-0001.safetensors")),
    ("full", Moment("os.rename", "*/changes-0001.safetensors", "cut")),
    ("ia3", Moment("os.rename", "*/stage-1/round-3/block-0001.safetensors")),
])  # fmt: skip
def test_a_killed_stage_goes_on_to_the_same_bits(small: Small, tmp_path: Path, method: str, moment: Moment) -> None:
    """Also what a server optimizer remembers."""
    stages = [PRUNE, {**IA3, "method": method, "rounds": 3, "server_optimizer": "adam", "server_lr": 0.01, "eval_every": 1}]
    whole, out = small.undisturbed(stages=stages), small.continued(tmp_path / "run", moment, stages=stages)
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())
    assert measurements(out) == measurements(whole)
    assert (out / "plan-1-tune.json").read_bytes() == (whole / "plan-1-tune.json").read_bytes()


@BOTH
def test_what_travels_is_the_change_so_far_and_what_a_round_changed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The plan counts its bytes: nothing else goes up or down, and in the first round there is nothing to send down."""
    travelled: dict[tuple[int, str], list[dict[str, Tensor]]] = {}
    real = LocalEngine.request

    def request(
        engine: LocalEngine, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[Any]:
        if kind != "tune/train":
            yield from real(engine, kind, messages, timeout)
            return
        taken = {client: messages[client] for client in messages}
        for message in taken.values():
            tensors, info = wire.unpack(message)
            travelled.setdefault((info["request"]["round"], "down"), []).append(tensors)
            round_ = info["request"]["round"]
        for client, answer, error in real(engine, kind, taken, timeout):
            assert answer is not None
            travelled.setdefault((round_, "up"), []).append(wire.unpack(answer)[0])
            yield client, answer, error

    monkeypatch.setattr(LocalEngine, "request", request)
    job = small.job("travel", stages=[{**IA3, "method": method, "precision": "float32"}], evaluate={})
    assert cli("run", job, "--out", tmp_path / "run", "--quiet")[0] == 0
    decoder = Decoder(Checkpoint(small.model))
    shapes = {name: decoder.read_shape(name) for name in decoder.linear_names()}
    part, dims = ("s", 1) if method == "ia3" else ("weight", 2)
    wanted = {name: torch.Size(shape[:dims]) for name, shape in shapes.items()}
    for (round_, direction), messages in travelled.items():
        assert len(messages) == len(CLIENTS)
        start = "change" if direction == "up" else "own"
        expected = {} if (round_, direction) == (0, "down") else {f"{start}/{n}/{part}": size for n, size in wanted.items()}
        for tensors in messages:
            assert {name: tensor.shape for name, tensor in tensors.items()} == expected
            assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert travelled.keys() == {(round_, direction) for round_ in (0, 1) for direction in ("up", "down")}
    plan = json.loads((tmp_path / "run" / "plan-0-tune.json").read_text())
    for client, assignment in plan["clients"].items():
        assert assignment["upload"] == assignment["download"]
        for key, direction in (("upload", "up"), ("download", "down")):
            sent = [line["bytes"] for line in lines(tmp_path / "run" / "ledger.jsonl")
                    if (line["client"], line["direction"], line["round"]) == (client, direction, 1)]  # fmt: skip
            assert sum(sent) == pytest.approx(assignment[key], rel=0.2), (method, direction)


def test_every_client_trains_scales_of_all_linears_and_says_nothing_else(small: Small) -> None:
    run = small.undisturbed(stages=[{**IA3, "rounds": 1}], **small.one_word())
    plan = json.loads((run / "plan-0-tune.json").read_text())
    assert plan["discloses"] == ["SCALES", "LOSS"]
    assert (plan["planner"], plan["parametrization"]) == ("uniform", "ia3")
    linears = list(Decoder(Checkpoint(small.model)).linear_names())
    assert [list(assignment["ranks"]) for assignment in plan["clients"].values()] == [linears] * len(CLIENTS)


@pytest.mark.parametrize("change", [
    {"dp_unit": "window", "epsilon": 1.0}, {"dp_unit": "client", "precision": "fixed", "epsilon": 20.0},
], ids=["window", "client"])  # fmt: skip
@pytest.mark.parametrize("privacy", [{}, SECURE], ids=["open", "secure"])
def test_scales_are_trained_with_noise(small: Small, change: dict[str, Any], privacy: dict[str, Any]) -> None:
    if privacy and change["dp_unit"] == "window":
        change = {**change, "precision": "fixed"}
    stage = {**IA3, "rounds": 1, "delta": 1e-3, **change}
    clients = [{"name": name, "data": str(small.texts["ash"])} for name in CLIENTS]  # as much text: one calibration for all
    run = small.undisturbed(stages=[stage], clients=clients, evaluate={}, privacy=privacy)
    plan = json.loads((run / "plan-0-tune.json").read_text())
    assert plan["discloses"] == ["SCALES"]
    assert len(plan["notes"]) == 1
    assert not any(name == "loss" for _, _, _, name in measurements(run))
