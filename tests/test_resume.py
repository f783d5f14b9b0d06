"""A run that was killed, wherever it was, ends after --resume as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from small import CLIENTS, Moment, Small, cli, complaint, killed, lines, measurements, result

TWO_ROUNDS = {"stages__0__rounds": 2}
SAMPLED = {"stages__0__layers": {"sample": 0.5, "cover": 1}, "stages__0__rounds": 2}

MOMENTS = {
    "before the job is written": Moment("os.rename", "*/job.toml"),
    "before the first ask": Moment("open", "*/ledger.jsonl"),
    "while the ledger is written": Moment("open", "*/ledger.jsonl", "cut", 9),
    "while hidden states are written": Moment("open", "*/clients/birch/*/0001.partial"),
    "while a client keeps its own block": Moment("os.rename", "*/clients/birch/alone/block-0001.safetensors", "cut"),
    "while a block is written": Moment("os.rename", "*/round-0/block-0000.safetensors", "cut"),
    "between two blocks": Moment("open", "*/ledger.jsonl", "kill", 13),
    "while the last block is written": Moment("os.rename", "*/round-0/block-0001.safetensors", "cut"),
    "while a measurement of the dense model is written": Moment("open", "*/metrics.jsonl", "cut", 2),
    "between two measurements of one client": Moment("open", "*/metrics.jsonl", "kill", 14),
    "while the last measurement is written": Moment("open", "*/metrics.jsonl", "cut", 18),
    "while the model is written": Moment("open", "*/model.partial/model.safetensors"),
    "before the model gets its name": Moment("os.rename", "*/model"),
}
AFTER_THE_MODEL = {
    "while the report is written": Moment("open", "*/report.html*"),
    "while working files are removed": Moment("shutil.rmtree", "*/clients/*"),
}


def alone(small: Small) -> dict[str, Any]:
    """Two texts, and what each client would have had by itself, are measured: a kill can come between the measurements."""
    return {"evaluate__alone": True, **small.two_texts()}


def check_killed_and_resumed(small: Small, out: Path, *moments: Moment, **changes: object) -> None:
    job = small.job(**changes)
    for moment in moments:
        killed("run", job, "--out", out, "--resume", moment=moment)
    resume(job, out)
    assert result(out) == result(small.undisturbed(**changes))


def resume(job: Path, out: Path) -> None:
    status, _, err = cli("run", job, "--out", out, "--resume")
    assert status == 0, err
    for line in lines(out / "ledger.jsonl"):
        assert set(line) == {"stage", "round", "client", "direction", "kind", "bytes"}
    assert not [file for file in out.rglob("*") if file.suffix in (".partial", ".lock")]
    assert not (out / "work").exists()
    assert not (out / "clients").exists()


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_a_killed_run_resumes_to_the_same_bits(small: Small, tmp_path: Path, moment: Moment) -> None:
    out = tmp_path / "run"
    killed("run", small.job(**alone(small)), "--out", out, moment=moment)
    assert not (out / "model").exists()
    check_killed_and_resumed(small, out, **alone(small))


@pytest.mark.parametrize("moment", AFTER_THE_MODEL.values(), ids=AFTER_THE_MODEL.keys())
def test_a_run_killed_after_its_model_was_written_only_tidies_up(small: Small, tmp_path: Path, moment: Moment) -> None:
    out = tmp_path / "run"
    killed("run", small.job(**alone(small)), "--out", out, moment=moment)
    ledger = (out / "ledger.jsonl").read_bytes()
    check_killed_and_resumed(small, out, **alone(small))
    assert (out / "ledger.jsonl").read_bytes() == ledger, "clients were asked again"


def test_a_finished_run_asks_nobody_again(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = small.job(**alone(small))
    resume(job, out)  # nothing is there yet: it begins
    before = {file: file.stat().st_mtime_ns for file in (out / "model").iterdir()} | {"ledger": lines(out / "ledger.jsonl")}
    resume(job, out)
    assert {file: file.stat().st_mtime_ns for file in (out / "model").iterdir()} | {
        "ledger": lines(out / "ledger.jsonl")
    } == before


def test_the_second_round_survives_several_kills(small: Small, tmp_path: Path) -> None:
    check_killed_and_resumed(
        small,
        tmp_path / "run",
        Moment("os.rename", "*/round-0/block-0001.safetensors", "cut"),
        Moment("open", "*/clients/cedar/*/0001.partial"),
        Moment("os.rename", "*/round-1/block-0000.safetensors", "cut"),
        Moment("os.rename", "*/round-1/block-0001.safetensors"),
        **TWO_ROUNDS,
        **alone(small),
    )


def test_sampled_layers_survive_kills(small: Small, tmp_path: Path) -> None:
    check_killed_and_resumed(
        small,
        tmp_path / "run",
        Moment("os.rename", "*/round-0/block-0001.safetensors", "cut"),
        Moment("os.rename", "*/round-1/block-0000.safetensors"),
        Moment("os.rename", "*/round-1/block-0001.safetensors", "cut"),
        **SAMPLED,
    )


def test_a_second_stage_survives_a_kill(small: Small, tmp_path: Path) -> None:
    stages = [
        {"kind": "prune", "pruner": "magnitude", "sparsity": 0.25, "samples": 2, "length": 16},
        {"kind": "prune", "pruner": "sparsegpt", "pattern": "2:4", "samples": 2, "length": 16},
    ]
    moment = Moment("os.rename", "*/stage-1/round-0/block-0001.safetensors", "cut")
    check_killed_and_resumed(small, tmp_path / "run", moment, stages=stages)


@pytest.mark.parametrize(
    "moment",
    [Moment("os.rename", "*/round-0/block-0001.safetensors"), Moment("open", "*/metrics.jsonl", "kill", 13)],
    ids=["between two asks", "before its evaluation"],
)
def test_a_client_that_lost_its_folder_in_round_one_gives_the_same_bits(small: Small, tmp_path: Path, moment: Moment) -> None:
    out = tmp_path / "run"
    killed("run", small.job(**alone(small)), "--out", out, moment=moment)
    shutil.rmtree(out / "clients" / "birch")
    check_killed_and_resumed(small, out, **alone(small))


def test_a_client_that_lost_its_folder_in_round_two_is_named_and_the_others_may_go_on(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = small.job(**TWO_ROUNDS)
    killed("run", job, "--out", out, moment=Moment("os.rename", "*/round-1/block-0001.safetensors"))
    shutil.rmtree(out / "clients" / "birch")
    line = complaint("run", job, "--out", out, "--resume")
    assert line.startswith("client 'birch': its working files are gone")
    assert "(2 of 3 clients responded, 3 needed: rounds.quorum)" in line
    status, _, err = cli("run", job, "--out", out, "--resume", "--set", "rounds.quorum=2")
    assert status == 0
    assert "birch: " in err
    records = json.loads((out / "pruning.json").read_text())["tensors"]
    assert {record["block"]: record["clients"] for record in records} == {0: ["ash", "birch", "cedar"], 1: ["ash", "cedar"]}


def test_the_undisturbed_run_measured_everything_once(small: Small) -> None:
    measured = measurements(small.undisturbed(**alone(small)))
    wanted = {(None, None, None), (0, None, None), *((0, None, client) for client in CLIENTS)}
    ends = {(*key, f"perplexity{end}") for key in wanted for end in ("", ".low", ".high") if not end or key[2] is None}
    assert set(measured) == {(*key, f"{name}/{text}") for *key, name in ends for text in ("held-0", "held-1")}


def test_the_plan_on_disk_is_the_one_in_force_also_while_a_continued_run_goes_on(small: Small, tmp_path: Path) -> None:
    tune = {"kind": "tune", "rounds": 3, "steps": 1, "length": 16, "ranks": [2, 4], "batches": [1], "bits": [32]}
    job = small.job("planned-anew", stages=[tune], evaluate={})
    out = tmp_path / "run"
    plan = out / "plan-0-tune.json"
    second_round = Moment("os.rename", "*/stage-0/*0001.safetensors")
    killed("run", job, "--out", out, "--quiet", moment=second_round)
    anew = plan.read_text()
    first = json.loads(cli("plan", job, "--json", "--quiet")[1])[0]
    assert json.loads(anew)["clients"] != first["clients"], "it was planned anew, from what the clients measured"
    killed("run", job, "--out", out, "--resume", "--quiet", moment=second_round)
    assert plan.read_text() == anew
    assert cli("run", job, "--out", out, "--resume", "--quiet")[0] == 0
    assert plan.read_text() == anew
