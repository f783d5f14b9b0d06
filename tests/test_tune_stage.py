"""A whole tuning stage, on a federation that runs in seconds."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedgrove import run as server
from fedgrove.client.local_client import LocalClient
from fedgrove.client.serve import serve
from fedgrove.client.windows import training_windows
from fedgrove.data.windows import IGNORED
from fedgrove.errors import FedgroveError
from fedgrove.evaluation.held_out import error_of_difference, mean_of
from fedgrove.job.load import load
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import measure_cost
from fedgrove.models.next_tokens import loss_sum
from fedgrove.models.stream import Checkpoint
from fedgrove.report.page import write_report
from fedgrove.rounds import wire
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.exchanges.capabilities import DescribeYourself
from fedgrove.runfolder import RunFolder
from fedgrove.stages.tune import cost, frozen, training
from fedgrove.stages.tune.changes import Start
from fedgrove.stages.tune.client_model import best_folder
from fedgrove.stages.tune.cost import ClientConfig, SearchSpace
from fedgrove.stages.tune.exchanges.importance import ImportanceSum
from fedgrove.stages.tune.exchanges.personal import ComparePersonal
from fedgrove.stages.tune.factors import Factors, fill
from fedgrove.stages.tune.parametrizations import Attachment, full, lora
from fedgrove.stages.tune.personal import best, hold_out, keep_best, mean_loss, pull
from fedgrove.stages.tune.trainers import sgd
from small import CLIENTS, Heard, Meddling, Moment, Small, cli, complaint, killed, lines, measurements
from test_report import Page

TUNE = {
    "kind": "tune", "method": "lora", "rounds": 2, "steps": 2, "length": 16, "batches": [4], "ranks": [4], "bits": [32],
    "learning_rate": 0.01,
}  # fmt: skip
FEDPIPE = {"method": "fedpipe", "importance_steps": 2}  # from the second on, all that is measured counts
PRUNE = {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": 3, "length": 16}


def tune(**changes: Any) -> list[dict[str, Any]]:
    return [{**TUNE, **(FEDPIPE if changes.get("method") == "fedpipe" else {}), **changes}]


def mean_perplexity(run: Path, stage: int | None) -> float:
    found = [v for (s, r, c, name), v in measurements(run).items() if s == stage and r is None and name.startswith("perpl")]
    return sum(found) / len(found)


def clients_of(job: Job, folder: Path) -> list[LocalClient]:
    """The job's clients, simulated in a folder."""
    return server.local_clients(job, server.open_model(job.model), folder)


def client_of(job: Job, folder: Path, name: str) -> LocalClient:
    return next(client for client in clients_of(job, folder) if client.name == name)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def meddle(does: str, tensors: dict[str, torch.Tensor], reply: dict[str, Any]) -> None:
    name = next(name for name in sorted(tensors) if name.startswith(wire.CHANGE))
    match does:
        case "nan":
            tensors[name] = tensors[name].index_fill(0, torch.tensor([0]), float("nan"))
        case "shape":
            tensors[name] = tensors[name][:1]
        case "more":
            reply["tokens"] *= 1000
        case "loss":
            reply["loss"] = "low"


def run_meddled(small: Small, out: Path, client: str, does: str, quorum: int | None) -> list[str]:
    heard = Heard()
    changes = {**small.one_word(), **({"rounds__quorum": quorum} if quorum else {})}
    job = load(small.job("meddled", stages=tune(rounds=1), **changes))
    run = RunFolder(out, job, listener=heard)
    try:
        of, change = CLIENTS if client == "all" else (client,), None if does == "vanish" else partial(meddle, does)
        server.run_job(job, Meddling(server.local_engine(job, out / "clients"), "tune/train", of, change), run)
    finally:
        run.close()
    return heard.lines


@pytest.mark.parametrize("method", ["lora", "full", "fedpipe"])
def test_tuning_lowers_perplexity_and_the_result_loads_anywhere(small: Small, method: str) -> None:
    run = small.undisturbed(stages=tune(method=method, rounds=3, steps=4), **small.one_word())
    assert mean_perplexity(run, 0) < 0.05 * mean_perplexity(run, None)
    before = load_file(small.model / "model.safetensors")
    after = weights(run)
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {name: (t.shape, t.dtype) for name, t in after.items()}
    same = {name for name in before if torch.equal(before[name], after[name])}
    if method != "fedpipe":  # which passes over linears that are not worth their bytes
        assert all("proj" not in name for name in same), "every linear was tuned"
    assert all("proj" in name or name in same for name in before), "nothing else was"
    AutoModelForCausalLM.from_pretrained(run / "model")


@pytest.mark.parametrize("aggregation", ["fedit", "ffa_lora", "flora", "fedex_lora"])
def test_every_aggregation_tunes(small: Small, aggregation: str) -> None:
    run = small.undisturbed(stages=tune(aggregation=aggregation), **small.one_word())
    assert mean_perplexity(run, 0) < 0.5 * mean_perplexity(run, None)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_every_server_optimizer_tunes(small: Small, optimizer: str) -> None:
    run = small.undisturbed(stages=tune(server_optimizer=optimizer), **small.one_word())
    assert mean_perplexity(run, 0) < 0.5 * mean_perplexity(run, None)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_frozen_base_may_have_fewer_bits_and_the_result_has_its_own_precision(small: Small, bits: int) -> None:
    if bits < 16:
        pytest.importorskip("bitsandbytes")
    run = small.undisturbed(stages=tune(bits=[bits]), **small.one_word())
    assert mean_perplexity(run, 0) < 0.5 * mean_perplexity(run, None)
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.bfloat16}


def test_what_bitsandbytes_multiplies_wrongly_is_not_in_4_bits(small: Small) -> None:
    """On a CPU it takes a weight for another one where the number of inputs is no multiple of 64, as of down_proj here."""
    pytest.importorskip("bitsandbytes")
    decoder = Decoder(Checkpoint(small.model))
    model = frozen.load(decoder, 4)
    torch.manual_seed(0)
    for name in decoder.linear_names():
        weight = decoder.read_matrix(name).float()
        x = torch.randn(32, weight.shape[1], dtype=torch.bfloat16)
        off = model.get_submodule(name)(x).float() - x.float() @ weight.T
        assert float(off.norm() / (x.float() @ weight.T).norm()) < 0.12, name


@pytest.mark.parametrize("change", [{}, {"method": "full"}, {"bits": [4]}, {"aggregation": "fedex_lora"}])
def test_after_pruning_the_zeros_stay_and_perplexity_falls(small: Small, change: dict[str, Any]) -> None:
    if change.get("bits") == [4]:
        pytest.importorskip("bitsandbytes")
    pruned = weights(small.undisturbed(stages=[PRUNE], **small.one_word()))
    run = small.undisturbed(stages=[PRUNE, {**TUNE, **change}], **small.one_word())
    after = weights(run)
    for row in json.loads((run / "pruning.json").read_text())["tensors"]:
        assert torch.equal(pruned[row["name"]] == 0, after[row["name"]] == 0)
        assert int((after[row["name"]] == 0).sum()) == row["pruned"] == row["numel"] // 2
        assert not torch.equal(pruned[row["name"]], after[row["name"]])
    assert mean_perplexity(run, 1) < 0.5 * mean_perplexity(run, 0)
    if change.get("method") != "full":
        assert "merged model" in (run / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("bits", [32, 16])
def test_what_was_trained_under_the_mask_is_what_is_merged(small: Small, bits: int) -> None:
    """One client, one round: the loss of the adapted pruned model and of the merged one are the same."""
    torch.manual_seed(0)
    decoder = Decoder(Checkpoint(small.model))
    masks = {name: torch.rand(decoder.read_shape(name)) > 0.5 for name in decoder.linear_names()}
    weights_ = {name: decoder.read_matrix(name).float() * masks[name] for name in masks}
    model = frozen.load(decoder, bits)
    dtype = next(model.parameters()).dtype
    weights_ = {name: weight.to(dtype) for name, weight in weights_.items()}
    for name, weight in weights_.items():
        model.get_submodule(name).weight.data = weight.clone()
    starts = {}
    for name, weight in weights_.items():
        rest = Factors(torch.randn(weight.shape[0], 2) * 0.1, torch.randn(2, weight.shape[1]) * 0.1)
        starts[name] = Start(fill(Factors.none(*weight.shape), 3, name, "0"), rest)
    lora.attach(model, starts, Attachment(dict.fromkeys(starts, 2.0), masks))
    ids = torch.randint(0, 4000, (4, 16))
    sgd.train_on(model, training.draw(ids, ids, 4, 0, "0"), training.Settings(3, 4, 2, 0.05))
    adapted = loss_sum(model, ids, ids)
    trained = lora.detach(model, list(starts), {})
    plain = frozen.load(Decoder(Checkpoint(small.model)), bits)
    for name, weight in weights_.items():
        change = trained[name].product() + starts[name].rest.product()
        plain.get_submodule(name).weight.data = lora.merge_dense(weight, change * masks[name], masked=True)
    torch.testing.assert_close(adapted, loss_sum(plain, ids, ids))


def test_the_adapter_gives_plain_peft_the_logits_of_the_merged_model(small: Small) -> None:
    from peft import PeftModel

    run = small.undisturbed(stages=tune(ranks=[2, 4], method="fedpipe"), model__dtype="float32", **small.one_word())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32)
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(run / "adapter"))(ids).logits
    assert (merged - before).abs().max() > 0.1
    assert (merged - adapted).abs().max() < 1e-3


def test_one_local_step_is_one_centralized_step_on_the_pooled_text(small: Small) -> None:
    """Equal ranks, equal data, plain gradient descent: the federation does what one owner of all text would."""
    rate, rank, number = 0.5, 4, 8
    stages = tune(rounds=1, steps=1, batches=[number], ranks=[rank], optimizer="sgd", max_grad_norm=0, learning_rate=rate,
                  precision="float32")  # fmt: skip
    job = load(small.job("one-step", stages=stages, model__dtype="float32"))
    windows = [training_windows(client, 16) for client in clients_of(job, small.folder / "one-step-clients")]
    least = min(len(ids) for ids, _ in windows)
    assert least >= number
    run_folder = small.undisturbed(stages=stages, model__dtype="float32")

    plan = json.loads((run_folder / "plan-0-tune.json").read_text())
    most = number * 16  # more than it can train on does not count
    tokens = {name: min(share["tokens"], most) for name, share in plan["clients"].items()}
    decoder = Decoder(Checkpoint(small.model, torch.float32))
    shapes = {name: decoder.read_shape(name) for name in decoder.linear_names()}
    starts = {n: Start(fill(Factors.none(*s), rank, n, "0/0"), Factors.none(*s)) for n, s in shapes.items()}
    model = frozen.load(decoder, 32)
    lora.attach(model, starts, Attachment(dict.fromkeys(starts, 2.0), {}))
    total = sum(tokens.values())
    with torch.enable_grad():
        for (ids, labels), name in zip(windows, CLIENTS, strict=True):
            drawn, wanted = next(training.draw(ids, labels, number, 0, f"0/0/{name}"))
            share = tokens[name] / total / (number * 15)
            (loss_sum(model, drawn, wanted) * share).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter -= rate * parameter.grad
    want = lora.detach(model, list(starts), {})
    got = weights(run_folder)
    before = load_file(small.model / "model.safetensors")
    for name, factors in want.items():
        change = got[f"{name}.weight"] - before[f"{name}.weight"].float()
        assert change.abs().max() > 1e-4
        assert (change - factors.product()).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["lora", "fedpipe", "full"])
def test_two_stages_tune_on_windows_of_different_lengths(small: Small, tmp_path: Path, method: str) -> None:
    """A client has another number of tokens for each length, by which it weighs; both are known before the first stage."""
    stages = [stage for length in (16, 20) for stage in tune(method=method, length=length, rounds=1)]
    run = small.undisturbed(stages=stages, evaluate={})
    job = load(run / "job.toml")
    tokens = []
    for stage in (0, 1):
        plan = json.loads((run / f"plan-{stage}-tune.json").read_text())
        tokens.append({name: assignment["tokens"] for name, assignment in plan["clients"].items()})
    for client in clients_of(job, tmp_path):
        counted = [training_windows(client, length)[0].numel() for length in (16, 20)]
        assert [said[client.name] for said in tokens] == counted
        assert counted[0] % 16 == counted[1] % 20 == 0
    assert tokens[0] != tokens[1], "else this test would not tell"
    assert {(s, c) for (s, r, c, name) in measurements(run) if name == "loss" and c} == {
        (stage, client) for stage in (0, 1) for client in CLIENTS
    }
    first = small.undisturbed(stages=stages[:1], evaluate={})
    changed = {name for name, tensor in weights(run).items() if not torch.equal(tensor, weights(first)[name])}
    assert changed, "the second stage went on from the first"


@pytest.mark.parametrize("moment", [
    Moment("os.rename", "*/changes-0001.safetensors"),
    Moment("os.rename", "*/changes-0001.safetensors", "cut"),
    Moment("open", "*/metrics.jsonl", "cut", count=9),
    Moment("open", "*/ledger.jsonl", count=52),  # the second round, when one client has answered
    Moment("os.rename", "*/stage-1/round-2/block-0001.safetensors"),
    Moment("os.rename", "*/adapter"),
])  # fmt: skip
def test_a_killed_stage_goes_on_to_the_same_bits(small: Small, tmp_path: Path, moment: Moment) -> None:
    stages = [PRUNE, *tune(method="fedpipe", replan_every=1, eval_every=1, ranks=[2, 4])]
    whole = small.undisturbed(stages=stages)
    job, out = small.job("resumed", stages=stages), tmp_path / "run"
    killed("run", job, "--out", out, "--quiet", moment=moment)
    if moment.path == "*/ledger.jsonl":
        last = lines(out / "ledger.jsonl")[-1]
        assert (last["kind"], last["round"], last["client"], last["direction"]) == ("tune/train", 1, "ash", "up")
    assert cli("run", job, "--out", out, "--resume", "--quiet")[0] == 0
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())
    assert measurements(out) == measurements(whole)
    for name in ("plan-1-tune.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(("second", "hysteresis", "since"), [
    ({0: 0.6, 1: 0.4}, None, 0),  # the same importance: the same plan
    ({0: 0.6, 1: 0.4}, 0.0, 1),
    ({0: 0.0, 1: 1.0}, None, 1),  # half of the old importance and half of the new: 0.3 to 0.7, so another matrix is tuned
    ({0: 0.38, 1: 0.62}, None, 0),  # 0.49 to 0.51: a little better is not enough
])  # fmt: skip
def test_a_plan_stays_unless_another_is_worth_more(
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    second: dict[int, float],
    hysteresis: float | None,
    since: int,
) -> None:
    """Every client can hold the adapter of one matrix, and two of the same shape are important, one in each block."""
    decoder = Decoder(Checkpoint(small.model))
    model, space = measure_cost(decoder, 16, False), SearchSpace((32,), (4,), (4,), 2, rest=4)
    matrix = "model.layers.{}.mlp.up_proj"
    memory = cost.memory(model, space, ClientConfig(32, 4, 1, {matrix.format(0): 4}))
    scores = [{0: 0.6, 1: 0.4}, second]

    def importance(total: ImportanceSum) -> dict[str, float]:
        now = scores.pop(0)
        return {name: next((now[i] for i in now if name == matrix.format(i)), 0.0) for name in decoder.linear_names()}

    monkeypatch.setattr(ImportanceSum, "importance", importance)
    if hysteresis is not None:
        monkeypatch.setattr("fedgrove.stages.tune.planning.HYSTERESIS", hysteresis)
    stages = tune(method="fedpipe", replan_every=1, deadline=3600.0, max_steps=4)
    clients = [{**client, "memory": int(memory)} for client in small.spec()["clients"]]
    job = small.job("planned-anew", stages=stages, clients=clients, evaluate={})
    assert cli("run", job, "--out", tmp_path / "run", "--quiet")[0] == 0
    plan = json.loads((tmp_path / "run" / "plan-0-tune.json").read_text())
    assert plan["since"] == since
    tuned = matrix.format(1 if since and second[1] > second[0] else 0)
    assert all(assignment["ranks"] == {tuned: 4} for assignment in plan["clients"].values())
    assert {name: value for name, value in plan["importance"].items() if value} == pytest.approx(
        {matrix.format(i): (start + second[i]) / 2 for i, start in ((0, 0.6), (1, 0.4))}
    )


@pytest.mark.usefixtures("forked_workers")
def test_worker_processes_and_the_order_of_clients_change_no_bit(small: Small, tmp_path: Path) -> None:
    stages = tune(method="fedpipe", ranks=[2, 4], rounds=1)
    whole = small.undisturbed(stages=stages)
    job = small.job("order", stages=stages, clients=small.spec(stages=stages)["clients"][::-1])
    assert cli("run", job, "--out", tmp_path / "run", "--workers", 2, "--quiet")[0] == 0
    assert all(torch.equal(tensor, weights(tmp_path / "run")[name]) for name, tensor in weights(whole).items())


@pytest.mark.parametrize(("does", "why"), [
    ("nan", "NaN"), ("shape", "shape"), ("more", "tokens"), ("loss", "loss"), ("vanish", "died"),
])  # fmt: skip
def test_a_bad_answer_is_refused_by_name_and_the_round_goes_on(small: Small, tmp_path: Path, does: str, why: str) -> None:
    said = run_meddled(small, tmp_path / "run", "birch", does, quorum=2)
    line = next(line for line in said if line.startswith("birch"))
    assert why in line
    heard = {c for (_, _, c, name) in measurements(tmp_path / "run") if name == "loss"}
    assert heard == {"ash", "cedar", None}
    assert mean_perplexity(tmp_path / "run", 0) < 0.5 * mean_perplexity(tmp_path / "run", None)


@pytest.mark.parametrize(("client", "quorum"), [("birch", None), ("all", 1)])
def test_too_few_answers_end_the_run_with_a_line(small: Small, tmp_path: Path, client: str, quorum: int | None) -> None:
    with pytest.raises(FedgroveError, match=r"client '(ash|birch)': its process died.*quorum"):
        run_meddled(small, tmp_path / "run", client, "vanish", quorum)


def test_a_loss_that_is_not_finite_is_told_on_the_client(small: Small) -> None:
    decoder = Decoder(Checkpoint(small.model))
    model = frozen.load(decoder, 32)
    model.get_input_embeddings().weight.data[0] = float("nan")
    full.attach(model, {"model.layers.0.mlp.up_proj": Start(full.Dense(), full.Dense())}, Attachment({}, {}))
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(FedgroveError, match="not finite"):
        sgd.train_on(model, training.draw(ids, ids, 2, 0, "0"), training.Settings(1, 2, 2, 0.1))


def test_clients_are_given_what_they_can_hold_and_the_rest_are_named(small: Small) -> None:
    room = {"deadline": 3600.0, "upload_price": 0.0}  # but for memory nothing is short, whatever turns out to be important
    few = {"rounds": 1, "max_steps": 4}
    job = small.spec(stages=tune(method="fedpipe", ranks=[2, 4, 8], batches=[1, 2, 4, 8], **room, **few))
    memories = {"ash": "2200KiB", "birch": "64MiB", "cedar": "1MiB"}
    clients = [{**client, "memory": memories[client["name"]]} for client in job["clients"]]
    run = small.undisturbed(stages=job["stages"], clients=clients, evaluate={})
    plan = json.loads((run / "plan-0-tune.json").read_text())
    assert set(plan["clients"]) == {"ash", "birch"}
    assert "MiB of memory, but it has 1 MiB" in plan["left_out"]["cedar"]
    ash, birch = plan["clients"]["ash"], plan["clients"]["birch"]
    assert ash["memory"] <= 2200 * 1024 < birch["memory"]
    assert sum(ash["ranks"].values()) < sum(birch["ranks"].values()) == 8 * len(plan["importance"])
    assert abs(sum(plan["importance"].values()) - 1) < 1e-9
    told = {name for (_, _, _, name) in measurements(run)}
    assert {f"importance/{name}" for name in plan["importance"]} <= told


def test_when_nobody_can_hold_anything_a_line_says_what_would_do(small: Small) -> None:
    spec = small.spec()
    clients = [{**client, "memory": "1MiB"} for client in spec["clients"]]
    for method in ("fedpipe", "lora", "full"):
        line = complaint("plan", small.job("nobody", stages=tune(method=method), clients=clients))
        assert "client 'ash'" in line
        assert "MiB of memory, but it has 1 MiB" in line


def test_a_rank_above_a_matrix_names_the_key_and_the_matrix(small: Small) -> None:
    line = complaint("plan", small.job("rank", stages=tune(ranks=[4, 500])))
    assert "stages.0.ranks: 500" in line
    assert "give 32 at most" in line


@pytest.mark.parametrize(("fields", "words"), [
    ({"prompt": "{question}", "answer": "{reply}"}, ["no field 'reply'", "key answer", "ash"]),
    ({"prompt": "{ask}", "answer": "{text}"}, ["no field 'ask'", "key prompt", "ash"]),
])  # fmt: skip
def test_a_record_without_the_answers_field_is_named(small: Small, tmp_path: Path, fields: dict, words: list[str]) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"question": "why", "text": "because"}\n')
    clients = [{"name": "ash", "data": str(data), **fields}, *small.spec()["clients"][1:]]
    line = complaint("plan", small.job("no-field", stages=tune(), clients=clients))
    assert all(word in line for word in words), line


# The shared adapter stays about where it begins.
PERSONAL = {**TUNE, "rounds": 1, "steps": 8, "personal": 0.3, "server_lr": 1e-3}


@pytest.mark.parametrize("first", [TUNE, PRUNE], ids=["dense", "pruned"])
def test_a_client_keeps_its_own_adapter_where_that_is_better_on_its_own_text(small: Small, first: dict[str, Any]) -> None:
    """Every client learns its text, and the server takes next to nothing of that: so its own adapter is better by far."""
    stages = [PRUNE, PERSONAL] if first is PRUNE else [PERSONAL]
    run = small.undisturbed(stages=stages, **small.one_word())
    number = 1 if first is PRUNE else 0
    losses = measurements(run)
    for client in CLIENTS:
        own, shared = (losses[number, None, client, f"personal/{which}"] for which in ("own", "shared"))
        assert own < 0.5 * shared
        folder = run / "clients" / client / "personal" / f"stage-{number}"
        assert folder.is_dir()
        if first is PRUNE:
            continue
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32), folder)
        windows = training_windows(client_of(load(run / "job.toml"), small.folder / "again", client), 16)
        (ids, _), held = hold_out(*windows, 0.3)
        assert held is not None
        assert len(ids) + len(held.choose[0]) + len(held.report[0]) == len(windows[0])
        assert mean_loss(model, held.report, 4) == pytest.approx(own, abs=1e-3), "the kept adapter is the one that was measured"
    sent = [line for line in lines(run / "ledger.jsonl") if (line["kind"], line["direction"]) == ("tune/personal", "up")]
    assert max(line["bytes"] for line in sent) < 1000, "two losses"
    assert {path.name for path in (run / "clients").glob("*/*")} == {"personal"}, "working files are let go"


def test_a_client_keeps_no_adapter_of_its_own_where_the_shared_one_is_better(small: Small, tmp_path: Path) -> None:
    """The loss of its own change is made up: once it is the best there can be, once the worst."""
    ash = client_of(load(small.job("kept", stages=[PERSONAL])), tmp_path, "ash")
    name = "model.layers.0.mlp.up_proj"
    shape = Decoder(Checkpoint(small.model)).read_shape(name)
    own = Factors(torch.ones(shape[0], 1), torch.ones(1, shape[1]))
    request = ComparePersonal(
        stage=0, round=2, parts=0, cut=None, bits=32, length=16, seed="0/0", personal=0.3, parametrization="lora", masked=(),
        micro=4, base=str(small.model), title="ash",
    )  # fmt: skip
    shared = {f"rest/{name}/b": torch.zeros(shape[0], 1), f"rest/{name}/a": torch.zeros(1, shape[1])}
    message = wire.pack(shared, {"request": request.model_dump(mode="json")})
    kept = tmp_path / "ash" / "personal" / "stage-0"
    for loss, stays in ((0.0, True), (1e9, False)):
        keep_best(best_folder(ash, 0), lora, loss, {name: own}, begin=True)
        told = wire.unpack(serve(request.KIND, message, ash, "cpu"))[1]
        assert told["keeps_own"] == stays, "it is chosen by the stored loss"
        assert told["own"] not in (loss, told["shared"]), "what is reported is measured anew, on other windows"
        assert told["error"] > 0
        assert kept.is_dir() == stays


def test_what_a_client_keeps_is_the_best_of_its_own_changes(tmp_path: Path) -> None:
    def change(value: float) -> dict[str, Factors]:
        return {"x": Factors(torch.full((2, 1), value), torch.ones(1, 3))}

    for begin, loss, value, best_loss, best_value in (
        (True, 5.0, 1.0, 5.0, 1.0),
        (False, 6.0, 2.0, 5.0, 1.0),
        (False, 4.0, 3.0, 4.0, 3.0),
        (False, 4.0, 4.0, 4.0, 3.0),
        (True, 9.0, 5.0, 9.0, 5.0),  # another run begins
    ):
        keep_best(tmp_path / "best", lora, loss, change(value), begin)
        found = best(tmp_path / "best", lora)
        assert found is not None
        assert found[0] == best_loss
        assert torch.equal(found[1]["x"].b, torch.full((2, 1), best_value))


def test_the_error_of_a_difference_is_that_of_its_windows() -> None:
    """Against many draws: the mean difference of 20 windows with these numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 30, (20,), generator=generator).tolist()
    other = [(0.0, count) for count in counts]

    def draw() -> list[tuple[float, int]]:
        return [(count * 0.3 + count**0.5 * float(torch.randn((), generator=generator)), count) for count in counts]

    drawn = [draw() for _ in range(400)]
    spread = float(torch.tensor([mean_of(one) for one in drawn]).std())
    said = sum(error_of_difference(one, other) or 0.0 for one in drawn) / len(drawn)
    assert said == pytest.approx(spread, rel=0.1)
    assert error_of_difference(other[:1], other[:1]) is None


def test_the_pull_is_that_of_the_weights_however_they_are_factored(small: Small) -> None:
    """Value and gradient against the dense difference; equal products of other factors are not pulled."""
    decoder = Decoder(Checkpoint(small.model))
    names = list(decoder.linear_names())[:3]
    generator = torch.Generator().manual_seed(0)

    def draw(rank: int, shape: tuple[int, int]) -> Factors:
        return Factors(*(torch.randn(size, generator=generator) for size in ((shape[0], rank), (rank, shape[1]))))

    shapes = {name: decoder.read_shape(name) for name in names}
    starts = {name: Start(draw(2, shape), draw(1, shape)) for name, shape in shapes.items()}
    shared = {name: draw(3, shape) for name, shape in shapes.items()}
    model = frozen.load(decoder, 32)
    lora.attach(model, starts, Attachment(dict.fromkeys(names, 2.0), {}))
    penalty = pull(model, lora, starts, names, shared, 0.5)
    dense = {name: (starts[name].own.plus(starts[name].rest).product() - shared[name].product()).double() for name in names}
    value = penalty()
    assert float(value.detach()) == pytest.approx(0.25 * sum(float(one.square().sum()) for one in dense.values()), rel=1e-5)
    value.backward()
    for name in names:
        layer = model.get_submodule(name)
        expected = 0.5 * dense[name] @ starts[name].own.a.double().T * 2.0  # the scale α/r is 2
        torch.testing.assert_close(layer.lora_B["own"].weight.grad.double(), expected, rtol=1e-4, atol=1e-4)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator))[0]
    same = {n: Factors(s.own.b @ turn, turn.T @ s.own.a).plus(s.rest) for n, s in starts.items()}
    assert float(pull(model, lora, starts, names, same, 1.0)().detach()) == pytest.approx(0.0, abs=1e-3)


def test_an_own_adapter_is_pulled_towards_the_shared_one(small: Small) -> None:
    """A pull of nearly nothing leaves each client its own text; one beyond measure leaves the shared adapter."""
    losses = {}
    for strength in (1e-9, 1e6):
        run = small.undisturbed(stages=[{**PERSONAL, "personal_pull": strength}], **small.one_word("tree", "house", "river"))
        found = measurements(run)
        own, shared = ([found[0, None, client, f"personal/{name}"] for client in CLIENTS] for name in ("own", "shared"))
        losses[strength] = sum(own) / sum(shared)
        plan = json.loads((run / "plan-0-tune.json").read_text())
    assert losses[1e-9] < 0.5
    assert 0.8 < losses[1e6] < 1.25
    own = small.undisturbed(stages=[PERSONAL], **small.one_word())
    plain = json.loads((own / "plan-0-tune.json").read_text())
    assert plan["clients"]["ash"]["compute"] == pytest.approx(2 * plain["clients"]["ash"]["compute"], rel=0.01)


def test_an_own_adapter_that_nothing_pulls_is_trained_as_the_one_that_is_sent(small: Small) -> None:
    """In the first round both have the same start and the same windows: training one must not move the other's start."""
    own = []
    for strength in (0.0, 1e-30):
        stage = {**PERSONAL, "rounds": 1, "steps": 3, "precision": "float32", "personal_pull": strength}
        run = small.undisturbed(stages=[stage], evaluate={})
        own.append([measurements(run)[0, None, client, "personal/own"] for client in CLIENTS])
    assert own[0] == pytest.approx(own[1], rel=1e-6)


ALONE = {"rounds": 2, "aggregation": "fedit", "precision": "float32", "personal": 0.3}


def test_alone_means_the_same_steps_without_the_others(small: Small, tmp_path: Path) -> None:
    """What each client would have alone is what a run with this client only gives: FedIT's mean of one is that one."""
    run = small.undisturbed(stages=tune(**ALONE), evaluate__alone=True)
    only = small.spec()["clients"][1:2]
    assert cli("run", small.job("only", stages=tune(**ALONE), clients=only), "--out", tmp_path / "run")[0] == 0
    alone, by_itself = measurements(run), measurements(tmp_path / "run")
    texts = [name for stage, _, client, name in alone if (stage, client) == (0, "birch") and name.startswith("perplexity/")]
    assert texts == ["perplexity/held-0"]
    for name in texts:
        assert alone[0, None, "birch", name] == pytest.approx(by_itself[0, None, None, name], rel=1e-4)
        assert alone[0, None, "birch", name] != pytest.approx(alone[0, None, None, name], rel=1e-4)
    assert alone[0, None, "birch", "personal/alone"] == pytest.approx(by_itself[0, None, "birch", "personal/shared"], rel=1e-4)
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "After the same steps alone:" in page.text
    assert Disclosure.WINDOW_LOSSES.sentence in page.text


@pytest.mark.parametrize("moment", [
    Moment("os.rename", "*/own-0001.safetensors", "cut"),
    Moment("os.rename", "*/birch/alone-0/block-0001.safetensors", "cut"),
])  # fmt: skip
def test_personal_adapters_of_a_killed_run_are_the_same(small: Small, tmp_path: Path, moment: Moment) -> None:
    stages = tune(**ALONE, personal_pull=0.1)
    job = small.job("killed-own", stages=stages, evaluate__alone=True)
    killed("run", job, "--out", tmp_path / "run", "--quiet", moment=moment)
    assert cli("run", job, "--out", tmp_path / "run", "--resume")[0] == 0
    whole = small.undisturbed(stages=stages, evaluate__alone=True)
    assert measurements(tmp_path / "run") == measurements(whole)
    kept = [file.relative_to(whole) for file in sorted(whole.glob("clients/*/personal/*/*.safetensors"))]
    assert [(tmp_path / "run" / file).read_bytes() for file in kept] == [(whole / file).read_bytes() for file in kept]


def test_text_held_out_for_oneself_is_not_trained_on() -> None:
    ids = torch.arange(40).view(10, 4)
    (train, _), held = hold_out(ids, ids, 0.3)
    assert held is not None
    assert [len(half[0]) for half in (held.choose, held.report)] == [2, 1]
    parts = [set(part.flatten().tolist()) for part in (train, held.choose[0], held.report[0])]
    assert sum(map(len, parts)) == len(set.union(*parts)) == ids.numel(), "no window is in two parts"
    assert hold_out(ids[:1], ids[:1], 0.3)[1] is None, "a single window is trained on"
    assert hold_out(ids, ids, 0.1)[1] is None, "one window cannot both choose and report"
    assert hold_out(ids, torch.full_like(ids, IGNORED), 0.3)[1] is None, "nothing in it could be measured"


def test_only_the_answer_is_learnt(small: Small, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"q": f"question {i} ", "a": f"reply {i}"}) + "\n" for i in range(20)))
    clients = [{"name": "ash", "data": str(data), "prompt": "{q}", "answer": "{a}"}]
    job = load(small.job("answers", stages=tune(), clients=clients))
    (client,) = clients_of(job, tmp_path / "clients")
    ids, labels = training_windows(client, 16)
    tokenizer = Checkpoint(small.model).tokenizer()
    learnt = tokenizer.decode(labels[labels >= 0])
    assert "reply" in learnt
    assert "question" not in learnt
    assert "question" in tokenizer.decode(ids.flatten())
    assert torch.equal(ids[labels >= 0], labels[labels >= 0])


def test_the_order_of_windows_covers_all_of_them_in_every_epoch() -> None:
    ids = torch.arange(7)[:, None].repeat(1, 3)
    batches = training.draw(ids, ids, 2, 0, "0")
    seen = torch.cat([next(batches)[0][:, 0] for _ in range(7)]).tolist()
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7] != seen[7:]
    later = training.draw(ids, ids, 2, 4, "0")
    assert next(later)[0][:, 0].tolist() == seen[4:6]


def sample(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of so many windows, and labels of which half are not learnt."""
    ids = torch.randint(0, 4000, (batch, 16), generator=torch.Generator().manual_seed(0))
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5, -100)


def trained(small: Small, settings: training.Settings, others: int = 0) -> tuple[float, dict[str, Factors]]:
    decoder = Decoder(Checkpoint(small.model))
    shapes = {name: decoder.read_shape(name) for name in decoder.linear_names()}
    model = frozen.load(decoder, 32)
    starts = {n: Start(fill(Factors.none(*s), 2, n, "0"), Factors.none(*s)) for n, s in shapes.items()}
    lora.attach(model, starts, Attachment(dict.fromkeys(starts, 2.0), {}))
    batches = training.draw(*sample(settings.batch), settings.batch, 0, "0")
    loss = sgd.train_on(model, batches, settings, others=[torch.device("cpu")] * others)
    return loss, lora.detach(model, list(shapes), {})


@pytest.mark.parametrize(("micro", "others"), [(4, 0), (6, 0), (1, 1), (2, 2), (6, 1)])
def test_windows_at_once_or_one_by_one_or_on_several_devices_make_no_difference(small: Small, micro: int, others: int) -> None:
    loss, factors = trained(small, training.Settings(2, 6, micro, 0.1, optimizer="sgd"), others)
    alone, expected = trained(small, training.Settings(2, 6, 1, 0.1, optimizer="sgd"))
    assert abs(loss - alone) < 1e-4
    for name, pair in factors.items():
        torch.testing.assert_close(pair.product(), expected[name].product(), atol=1e-5, rtol=1e-3)


def test_the_proximal_term_pulls_back_to_where_the_round_began(small: Small) -> None:
    """Two SGD steps by hand: the second gradient gains μ(θ₁ − θ₀), and nothing else changes."""
    rate, mu = 0.1, 3.0
    _, free = trained(small, training.Settings(1, 6, 6, rate, optimizer="sgd"))
    _, plain = trained(small, training.Settings(2, 6, 6, rate, optimizer="sgd"))
    _, bound = trained(small, training.Settings(2, 6, 6, rate, optimizer="sgd", proximal=mu))
    moved = 0.0
    for name, factors in free.items():
        begun = fill(Factors.none(factors.b.shape[0], factors.a.shape[1]), 2, name, "0")
        for after, one, start, two in (
            (bound[name].b, factors.b, begun.b, plain[name].b),
            (bound[name].a, factors.a, begun.a, plain[name].a),
        ):
            torch.testing.assert_close(after, two - rate * mu * (one - start).float(), atol=1e-6, rtol=1e-4)
            moved += float((after - two).abs().sum())
    assert moved > 1e-3


def test_the_ledger_holds_every_message_and_the_clock_runs(small: Small) -> None:
    run = small.undisturbed(stages=[PRUNE, TUNE], **small.one_word())
    kinds = [(line["kind"], line["direction"]) for line in lines(run / "ledger.jsonl") if line["stage"] == 1]
    assert kinds.count(("tune/train", "up")) == kinds.count(("tune/train", "down")) == 2 * len(CLIENTS)
    assert kinds.count(("tune/base", "down")) == 2 * len(CLIENTS), "the pruned blocks travel once"
    clock = [v for (s, r, c, name), v in measurements(run).items() if name == "clock"]
    assert 0 < clock[0] < clock[1]
    assert tomllib.loads((run / "job.toml").read_text())["stages"][1]["aggregation"] == "flexlora"


@pytest.mark.parametrize("method", ["fedpipe", "lora"])
def test_the_ledger_tells_modelled_seconds_and_the_plan_foretells_them(small: Small, method: str) -> None:
    clients = [
        {**client, "speed": 1.0 + i, "uplink": "10Gbit", "downlink": "20Gbit"}
        for i, client in enumerate(small.spec()["clients"])
    ]
    run = small.undisturbed(stages=tune(method=method), clients=clients)
    ledger = [line for line in lines(run / "ledger.jsonl") if line["kind"] in ("tune/importance", "tune/train")]
    for line in ledger:
        assert line["transfer"] == pytest.approx(8 * line["bytes"] / (1e10 if line["direction"] == "up" else 2e10))
        assert ("compute" in line) == (line["direction"] == "up")
    spent: dict[tuple[int, str], dict[str, float]] = {}
    for line in ledger:
        of = spent.setdefault((line["round"], line["kind"]), {})
        of[line["client"]] = of.get(line["client"], 0.0) + line["transfer"] + line.get("compute", 0.0)
    clock = sum(max(of.values()) for of in spent.values())
    assert measurements(run)[0, 1, None, "clock"] == pytest.approx(clock), "rounds go on when the slowest has answered"
    assert measurements(run)[0, 1, "ash", "seconds"] == pytest.approx(spent[1, "tune/train"]["ash"])
    status, out, _ = cli("plan", run / "job.toml")
    assert status == 0
    foretold = json.loads((run / "plan-0-tune.json").read_text())["total"]
    assert foretold == pytest.approx(clock, rel=0.05, abs=2e-3)
    assert f"{foretold:,.1f} s on the clients' machines" in " ".join(out.split())


def test_a_run_ends_with_what_each_client_was_given_and_why(small: Small, tmp_path: Path) -> None:
    spec = small.spec()
    clients = [{**spec["clients"][0], "memory": "8MiB", "uplink": "1Mbit"}, *spec["clients"][1:]]
    job = small.job("told", stages=tune(method="fedpipe", ranks=[2, 4], rounds=1), clients=clients)
    status, out, _ = cli("run", job, "--out", tmp_path / "run")
    assert status == 0
    line = next(line for line in out.splitlines() if "ash" in line)
    assert "8 MiB" in line
    assert "fedpipe" in out


def test_the_report_draws_what_matters_and_tells_what_each_client_was_given(small: Small) -> None:
    run = small.undisturbed(stages=tune(method="fedpipe", rounds=3, steps=1))
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    plan = json.loads((run / "plan-0-tune.json").read_text(encoding="utf-8"))
    metrics = measurements(run)
    head, *rows = page.csv("stage-0-importance")
    assert head == ["matrix", "importance", *(f"rank, {client}" for client in CLIENTS)]
    assert {row[0]: float(row[1]) for row in rows} == plan["importance"]
    for name, importance in plan["importance"].items():
        assert metrics[0, 0, None, f"importance/{name}"] == importance, "the scores are saved"
        block, _, linear = name.removeprefix("model.layers.").partition(".")
        assert f"block {block}, {linear}: {importance:.2%}, " in page.text, "each has its place on the map"
    for row in rows:
        assert [int(rank) for rank in row[2:]] == [plan["clients"][client]["ranks"].get(row[0], 0) for client in CLIENTS]
    given = {row[0]: dict(zip(page.csv("stage-0-given")[0], row, strict=True)) for row in page.csv("stage-0-given")[1:]}
    for client, share in plan["clients"].items():
        assert [int(given[client][key]) for key in ("bits", "batch", "upload a round")] == [
            share["bits"], share["batch"], share["upload"]
        ]  # fmt: skip
        assert float(given[client]["loss, last round"]) == metrics[0, 2, client, "loss"]
    rounds = page.csv("stage-0-rounds")
    assert [float(row[2]) for row in rounds[1:]] == [metrics[0, r, None, "clock"] for r in range(3)]
    assert Disclosure.FACTORS.sentence in page.text
    assert Disclosure.IMPORTANCE.sentence in page.text
    assert Disclosure.WEIGHTS.sentence not in page.text, "nothing was pruned"


def test_the_report_lists_who_gained_by_an_adapter_of_its_own(small: Small, tmp_path: Path) -> None:
    run = small.undisturbed(stages=[PERSONAL], **small.one_word())
    rows = lines(run / "metrics.jsonl")
    for row in rows:
        if (row["client"], row["name"]) == ("cedar", "personal/keeps"):
            row["value"] = 0.0  # as if it had chosen the shared adapter
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(copy)
    page = Page((copy / "report.html").read_text(encoding="utf-8"))
    metrics = measurements(copy)
    table = page.csv("stage-0-personal")[1:]
    assert {row[0]: row[4] for row in table} == {"ash": "its own", "birch": "its own", "cedar": "the shared one"}
    for client, shared, own, _, keeps, gain, around in table:
        assert [float(shared), float(own)] == [metrics[0, None, client, f"personal/{which}"] for which in ("shared", "own")]
        keeps_own = keeps == "its own"
        assert float(gain) == (float(shared) - float(own) if keeps_own else 0.0)
        assert float(around) == (1.96 * metrics[0, None, client, "personal/error"] if keeps_own else 0.0)
    assert "2 of 3 owners keep adapters of their own: ash and birch." in page.text
    kept = {row[0]: float(row[2 if row[4] == "its own" else 1]) for row in table}
    tokens = {client: one["tokens"] for client, one in json.loads((copy / "plan-0-tune.json").read_text())["clients"].items()}
    weighted = sum(kept[client] * tokens[client] for client in CLIENTS) / sum(tokens.values())
    worst = max(kept, key=lambda client: kept[client])
    says = f"keeps: {weighted:.3f} weighted by tokens, {sum(kept.values()) / 3:.3f} as the plain mean of 3 owners"
    assert f"{says}, {kept[worst]:.3f} for the worst ({worst})" in page.text


def test_a_measured_speed_is_kept_so_that_a_plan_stays(small: Small, tmp_path: Path) -> None:
    clients = [{**client, "speed": "measure"} for client in small.spec()["clients"]]
    job = load(small.job("measured", stages=tune(), clients=clients))
    request = DescribeYourself(calibrations=(), lengths=(16,))
    message = wire.pack({}, {"request": request.model_dump(mode="json")})
    ash = client_of(job, tmp_path / "clients", "ash")
    said = [wire.unpack(serve(request.KIND, message, ash, "cpu"))[1] for _ in range(2)]
    assert said[0] == said[1]
    assert said[0]["speed"] > 0
    assert said[0]["tokens"]["16"] > 0
    assert said[0]["tokens"]["16"] % 16 == 0


def test_without_bitsandbytes_a_client_offers_no_few_bits_and_asking_for_them_is_a_line(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a))
    assert "8 and 4 need bitsandbytes" in complaint("plan", small.job("few-bits", stages=tune(method="fedpipe", bits=[4])))
    with pytest.raises(FedgroveError, match="pip install"):
        frozen.load(Decoder(Checkpoint(small.model)), 4)
