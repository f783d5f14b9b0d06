"""The user's contract: what commands print and write, and what may be relied upon."""

from __future__ import annotations

import json
import math
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedgrove.client.serve
import fedgrove.rounds.collect
from fedgrove import plugins
from fedgrove.data.windows import calibration_windows
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.masks import Target
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds import wire
from fedgrove.rounds.exchanges.capabilities import DescribeYourself
from fedgrove.stages.prune.calibration_pass import windows_at_once
from fedgrove.stages.prune.exchanges.alone import EvaluateAlone
from fedgrove.stages.prune.exchanges.block import PruneBlock
from small import CLIENTS, LENGTH, SAMPLES, Small, cli, lines, make_model, make_texts, measurements, process, result

# The run folder


def test_a_run_folder_holds_what_the_contract_says(small: Small) -> None:
    run = small.undisturbed()
    files = {file.name for file in run.iterdir()}
    assert files == {
        "job.toml", "plan-0-prune.json", "metrics.jsonl", "examples.jsonl", "ledger.jsonl", "model", "pruning.json",
        "report.html",
    }  # fmt: skip

    job = tomllib.loads((run / "job.toml").read_text())
    assert job["stages"][0]["aggregation"] == "fedspallm", "defaults are filled in"
    assert Path(job["clients"][0]["data"][0]).is_absolute()

    plan = json.loads((run / "plan-0-prune.json").read_text())
    assert (plan["stage"], plan["kind"], plan["num_blocks"]) == (0, "prune", 2)
    assert set(plan["clients"]) == set(CLIENTS)
    for share in plan["clients"].values():
        assert set(share) == {"blocks", "weight", "samples", "sparsity", "held_out", "memory", "upload", "seconds"}
        assert share["blocks"] == [[0, 1]]

    times = [line["time"] for line in lines(run / "metrics.jsonl")]
    assert times == sorted(times)
    assert all(math.isfinite(value) and value > 1 for value in measurements(run).values())

    assert "<html" in (run / "report.html").read_text()


def test_pruning_json_tells_the_truth_of_every_tensor(small: Small) -> None:
    run = small.undisturbed()
    told = json.loads((run / "pruning.json").read_text())
    weights = load_file(run / "model" / "model.safetensors")
    dense = load_file(small.model / "model.safetensors")
    assert len(told["tensors"]) == 14
    for record in told["tensors"]:
        weight = weights[record["name"]]
        zeros = int((weight == 0).sum())
        assert (record["numel"], record["pruned"]) == (weight.numel(), zeros)
        assert record["target"] == record["sparsity"] == 0.5
        assert zeros == weight.numel() // 2
        assert record["pattern"] is None
        assert record["clients"] == list(CLIENTS)
        assert 0 < record["agreement"] < 1
        assert re.fullmatch("[0-9a-f]{64}", record["sha256"])
    touched = {record["name"] for record in told["tensors"]}
    assert all(torch.equal(weights[name], dense[name]) for name in dense.keys() - touched)
    assert set(weights) == set(dense)


def test_pruning_json_tells_of_every_stage_and_round(small: Small, tmp_path: Path) -> None:
    stages = [
        {**small.spec()["stages"][0], "rounds": 2, "layers": {"sample": 0.5, "cover": 1}},
        {**small.spec()["stages"][0], "sparsity": 0.6, "pruner": "magnitude"},
    ]
    job = small.job("twice", stages=stages, evaluate__prompts=["The forest"])
    assert cli("run", job, "--out", tmp_path / "run", "--quiet")[0] == 0
    told = json.loads((tmp_path / "run" / "pruning.json").read_text())
    plans = [json.loads((tmp_path / "run" / f"plan-{stage}-prune.json").read_text())["clients"] for stage in (0, 1)]
    assert [(entry["stage"], entry["round"], entry["block"]) for entry in told["history"]] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)
    ]  # fmt: skip
    for entry in told["history"]:
        share = {client: plan["blocks"][entry["round"]] for client, plan in plans[entry["stage"]].items()}
        assert entry["clients"] == sorted(client for client, blocks in share.items() if entry["block"] in blocks)
        assert entry["pruned"] == pytest.approx([0.5, 0.6][entry["stage"]] * entry["numel"], abs=7)
    assert {(row["stage"], row["target"]) for row in told["tensors"]} == {(1, 0.6)}
    assert len(told["tensors"]) == 14

    told = json.loads((tmp_path / "run" / "samples.json").read_text())["samples"]
    for key, model in (("before", small.model), ("after", tmp_path / "run" / "model")):
        tokenizer = AutoTokenizer.from_pretrained(model)
        ids = tokenizer("The forest", return_tensors="pt")["input_ids"]
        plain = AutoModelForCausalLM.from_pretrained(model)
        wanted = tokenizer.decode(plain(ids).logits[0, -1].argmax()).strip()
        assert told[0][key].startswith(wanted)


def test_the_ledger_counts_the_bytes_of_real_messages(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def pack(tensors: dict[str, torch.Tensor], info: wire.Info) -> bytes:
        message = wire.pack(tensors, info)
        sent.append(len(message))
        return message

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return pack if name == "pack" else getattr(wire, name)

    monkeypatch.setattr(fedgrove.rounds.collect, "wire", Counted())
    monkeypatch.setattr(fedgrove.client.serve, "wire", Counted())
    assert cli("run", small.job(evaluate__alone=True), "--out", tmp_path / "run")[0] == 0
    ledger = lines(tmp_path / "run" / "ledger.jsonl")
    assert [line["bytes"] for line in ledger] == sent
    assert len(ledger) == 2 * len(CLIENTS) * (1 + 2 + 1), "capabilities, two blocks and an evaluation; each goes down and up"
    for line in ledger:
        assert set(line) == {"stage", "round", "client", "direction", "kind", "bytes"}
        assert line["direction"] in ("up", "down")
        assert line["kind"] in (DescribeYourself.KIND, PruneBlock.KIND, EvaluateAlone.KIND)


# Commands


def test_json_is_one_document_and_nothing_else(small: Small, tmp_path: Path) -> None:
    job = small.job(evaluate__alone=True)
    status, out, err = cli("run", job, "--out", tmp_path / "run", "--json")
    document = json.loads(out)
    assert status == 0
    assert document["sparsity"] == 0.5
    assert set(document["perplexity"]) == {"dense", "alone", "federated"}
    assert "prune: round 1 of 1, block 2 of 2" in err
    assert cli("run", job, "--out", tmp_path / "quiet", "--quiet", "--json")[2] == ""

    status, out, err = cli("plan", job, "--json", "--quiet")
    assert json.loads(out)[0] == json.loads((tmp_path / "run" / "plan-0-prune.json").read_text())
    assert err == ""

    status, out, _ = cli("evaluate", tmp_path / "run", "--data", small.texts["held-0"], "--length", 32, "--json")
    assert json.loads(out)["length"] == 32


def test_plan_runs_nothing_and_leaves_nothing_behind(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, here = tmp_path / "tmp", tmp_path / "here"
    temporary.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def runs(*_: Any) -> None:
        raise AssertionError("it runs")

    monkeypatch.setattr("fedgrove.stages.prune.stage.run", runs)
    monkeypatch.setattr(PruneBlock, "respond", runs)
    status, out, err = cli("plan", small.job("planned"), "--set", "stages.0.layers={sample=0.5, cover=1}", "--set",
                           "evaluate.alone=false", "--quiet")  # fmt: skip
    assert (status, err) == (0, "")
    for name in CLIENTS:
        assert name in out
    assert not list(temporary.iterdir())
    assert not list(here.iterdir())


def test_init_gives_a_job_that_runs_once_it_is_edited(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert cli("init", folder)[0] == 0
    words = small.texts["ash"].read_text().split()
    halves = [" ".join(words[:100]), " ".join(words[100:])]
    shutil.copytree(small.model, folder / "path" / "to" / "model")
    (folder / "hospital-a.jsonl").write_text("".join(json.dumps({"question": h, "answer": "So."}) + "\n" for h in halves))
    (folder / "hospital-b.csv").write_text("note\n" + "\n".join(f'"{half}"' for half in halves) + "\n")
    (folder / "heldout.txt").write_text(small.texts["held-0"].read_text())
    file = folder / "job.toml"
    text = file.read_text()
    for table, key, value in (("[[stages]]", "samples", 2), ("[[stages]]", "length", 16), ("[evaluate]", "length", 32)):
        before, header, rest = text.partition(f"\n{table}")
        rest, changed = re.subn(rf"(?m)^({key} *=) \d+", rf"\1 {value}", rest, count=1)
        assert changed == 1
        text = before + header + rest
    file.write_text(text)
    status, out, err = cli("run", file, "--out", tmp_path / "run")
    assert status == 0, err
    assert "heldout" in out
    optional = re.sub(r"(?m)^# (\w+ *=)", r"\1", text)
    file.write_text(optional)
    assert tomllib.loads(optional)["rounds"]["quorum"] == 2, "what is commented out is TOML too"
    status, out, err = cli("plan", file, "--set", "clients.1.samples=2")
    assert status == 0, err


def test_set_changes_what_runs(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ("--set", "stages.0.sparsity=0.25", "--set", "name=other", "--set", "evaluate.alone=false")
    assert cli("run", small.job(), "--out", out, *changes)[0] == 0
    assert {record["sparsity"] for record in json.loads((out / "pruning.json").read_text())["tensors"]} == {0.25}
    assert tomllib.loads((out / "job.toml").read_text())["name"] == "other"


def test_the_job_of_a_run_folder_gives_the_same_run_from_anywhere(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("run", small.undisturbed() / "job.toml")[0] == 0
    assert result(tmp_path / "runs" / "small") == result(small.undisturbed())


def test_report_writes_the_same_page_again(small: Small, tmp_path: Path) -> None:
    run = shutil.copytree(small.undisturbed(), tmp_path / small.undisturbed().name)
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert cli("report", run)[0] == 0
    assert (run / "report.html").read_text() == before


# The numbers


def plain_perplexity(model: Path, text: Path, length: int) -> float:
    """Token-weighted perplexity as it is defined, with nothing but transformers: stride = length, no overlap."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"]
    total, count = 0.0, 0
    for start in range(0, ids.shape[1], length):
        window = ids[:, start : start + length]
        if window.shape[1] > 1:
            with torch.no_grad():
                total += float(plain(window, labels=window).loss) * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return math.exp(total / count)


@pytest.mark.parametrize("length", [32, 50])
def test_evaluate_agrees_with_plain_transformers(small: Small, length: int) -> None:
    run, text = small.undisturbed(), small.texts["held-1"]
    _, out, _ = cli("evaluate", run, "--data", text, "--length", length, "--json")
    got = json.loads(out)["texts"][str(text)]
    assert got["perplexity"] == pytest.approx(plain_perplexity(run / "model", text, length), rel=1e-4)


def test_evaluate_agrees_with_plain_transformers_on_the_shipped_model(grove: Path, demo: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((demo / "texts" / "theatre-heldout.txt").read_text()[:6000])
    _, out, _ = cli("evaluate", grove, "--data", text, "--length", 256, "--json")
    got = json.loads(out)["texts"][str(text)]["perplexity"]
    assert got == pytest.approx(plain_perplexity(grove, text, 256), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"stages__0__layers": {"sample": 0.5, "cover": 1}, "stages__0__rounds": 2}],
    ids=["all", "sampled"],
)
def test_the_order_of_clients_changes_nothing(small: Small, tmp_path: Path, changes: dict[str, Any]) -> None:
    clients = small.spec()["clients"]
    permuted = small.job("permuted", **changes, clients=[clients[2], clients[0], clients[1]])
    assert cli("run", permuted, "--out", tmp_path / "run")[0] == 0
    assert result(tmp_path / "run") == result(small.undisturbed(**changes))


@pytest.mark.parametrize(
    ("pruner", "target"),
    [("wanda", Target(0.5)), ("sparsegpt", Target(0.7)), ("magnitude", Target(0.5)), ("sparsegpt", Target(0.5, (2, 4)))],
    ids=str,
)
def test_one_client_alone_gets_exactly_what_its_pruner_gives(small: Small, tmp_path: Path, pruner: str, target: Target) -> None:
    """Against plain transformers: the whole model in memory, hooks on its linears, the pruner called directly."""
    wanted: dict[str, Any] = {"clients": small.spec()["clients"][:1], "stages__0__pruner": pruner}
    wanted["stages__0__sparsity"] = None if target.pattern else target.sparsity
    if target.pattern:
        wanted["stages__0__pattern"] = "2:4"
    assert cli("run", small.job("one", **wanted), "--out", tmp_path / "run")[0] == 0

    model = AutoModelForCausalLM.from_pretrained(small.model, dtype=torch.float32)
    method = plugins.load("stages.prune.pruners", pruner)
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    windows = calibration_windows([small.texts["ash"]], None, tokenizer, SAMPLES, LENGTH, "0/0/ash")
    for block in model.model.layers:
        linears = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
        inputs = {name: InputStatistics(method.NEEDS) for name in linears}
        hooks = [
            module.register_forward_pre_hook(lambda module, args, seen=inputs[name]: seen.add(args[0]))
            for name, module in linears.items()
        ]
        with torch.no_grad():
            for ids in windows.split(windows_at_once(SAMPLES, LENGTH)):
                model(ids)
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            pruned, _ = method.prune(module.weight.detach().clone(), inputs[name], target)
            module.weight.data = pruned.to(torch.bfloat16).float()
    expected = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    for name, weight in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        assert torch.equal(weight.view(torch.int16), expected[name].view(torch.int16)), name


def test_the_result_loads_in_plain_transformers(small: Small) -> None:
    model = AutoModelForCausalLM.from_pretrained(small.undisturbed() / "model")
    tokenizer = AutoTokenizer.from_pretrained(small.undisturbed() / "model")
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(**tokenizer("A small forest", return_tensors="pt")).logits).all()


@pytest.mark.parametrize(("layers", "most"), [("all", 0.45), ({"sample": 0.5, "cover": 1}, 0.225)], ids=["all", "half"])
def test_a_client_sends_less_than_half_of_the_dense_bytes(
    grove: Path, demo: Path, tmp_path: Path, layers: object, most: float
) -> None:
    """Of trained weights: two blocks of the shipped model."""
    Checkpoint(grove).over(kept_blocks=(0, 1)).write(tmp_path / "model")
    clients = [{"name": name, "data": str(demo / "texts" / f"{name}.txt")} for name in ("publisher", "theatre")]
    stage = {"kind": "prune", "pruner": "sparsegpt", "sparsity": 0.5, "samples": 2, "length": 64, "layers": layers}
    job = {"name": "uplink", "model": {"path": str(tmp_path / "model")}, "clients": clients, "stages": [stage]}
    file, run = tmp_path / "job.toml", tmp_path / "run"
    file.write_text(tomli_w.dumps(job))
    assert cli("run", file, "--out", run, "--quiet")[0] == 0
    matrices = sum(record["numel"] for record in json.loads((run / "pruning.json").read_text())["tensors"])
    for client in clients:
        up = sum(line["bytes"] for line in lines(run / "ledger.jsonl")
                 if (line["client"], line["direction"]) == (client["name"], "up"))  # fmt: skip
        assert up <= most * 2 * matrices


def test_the_memory_of_the_server_does_not_grow_with_the_clients(tmp_path: Path) -> None:
    """Two rounds, so that the block travels down as well; a block of 2 MB, so that 36 of anything would show."""
    model = make_model(tmp_path / "model", num_hidden_layers=1, hidden_size=256, intermediate_size=1024)
    text = make_texts(tmp_path, ["all"])["all"]
    peaks = {}
    for number in (4, 40):
        clients = [{"name": f"client-{i:02}", "data": str(text)} for i in range(number)]
        stage = {"kind": "prune", "pruner": "magnitude", "sparsity": 0.5, "samples": 1, "length": 8, "rounds": 2}
        job = {"name": "memory", "model": {"path": str(model)}, "clients": clients, "stages": [stage]}
        file = tmp_path / f"{number}.toml"
        file.write_text(tomli_w.dumps(job))
        status, _, err = process("run", file, "--out", tmp_path / f"run-{number}", "--quiet", peak=tmp_path / "peak")
        assert status == 0, err
        peaks[number] = int((tmp_path / "peak").read_text())
    assert peaks[40] <= 1.05 * peaks[4], peaks
