"""What one owner of all the text would have: a simulation may try it, a federation may not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from fedgrove.centralized import centralized_client, centralized_job
from fedgrove.client.windows import calibration_windows, training_windows
from fedgrove.errors import FedgroveError
from fedgrove.job.load import load, load_federated
from fedgrove.report.reader import read
from fedgrove.report.summary import CENTRALIZED
from fedgrove.run import local_clients, open_model
from fedgrove.stages.prune.config import Config as PruneStage
from fedgrove.stages.tune.config import Config as TuneStage
from small import CLIENTS, SAMPLES, Moment, Small, cli, measurements, process


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_summed_statistics_are_what_one_owner_of_all_text_would_get_bit_for_bit(small: Small) -> None:
    run = small.undisturbed(evaluate__centralized=True, stages__0__aggregation="pooled")
    assert digest(run) == digest(run / CENTRALIZED)
    found = read(run)
    assert found.centralized == found.federated
    assert found.against_centralized(found.texts) == (1.0, 1.0)


def test_with_votes_it_is_another_model_whose_measurements_stand_beside(small: Small) -> None:
    run = small.undisturbed(evaluate__centralized=True)
    inner = run / CENTRALIZED
    assert digest(run) != digest(inner)
    found, measured = read(run), measurements(inner)
    assert found.centralized == {text: measured[0, None, None, f"perplexity/{text}"] for text in found.texts}
    assert {key: value for key, value in measured.items() if key[0] is None} == {
        key: value for key, value in measurements(run).items() if key[0] is None
    }, "the model as it came was measured once"
    plan = json.loads((inner / "plan-0-prune.json").read_text())
    assert plan["clients"][CENTRALIZED]["samples"] == SAMPLES * len(CLIENTS)
    assert not (inner / "clients").exists()
    plain = small.undisturbed()
    assert digest(run) == digest(plain), "the federation itself does not change by it"
    assert sum(found.uplink.values()) == sum(read(plain).uplink.values()), "nor its bytes"


def test_it_has_every_window_of_everybody_and_no_other(small: Small, tmp_path: Path) -> None:
    job = load(small.job("uneven", clients__1__samples=5))
    clients = local_clients(job, open_model(job.model), tmp_path)
    one = centralized_client(clients, tmp_path)
    drawn = zip(clients, (SAMPLES, 5, SAMPLES), strict=True)
    each = [calibration_windows(client, number, 16, "0/0") for client, number in drawn]
    assert torch.equal(calibration_windows(one, 2 * SAMPLES + 5, 16, "0/0"), torch.cat(each))
    learnt = [training_windows(client, 16)[0] for client in clients]
    assert torch.equal(training_windows(one, 16)[0], torch.cat(learnt))
    wanted = centralized_job(job).stages[0]
    assert isinstance(wanted, PruneStage)
    assert wanted.samples == 2 * SAMPLES + 5


def test_a_tuned_federation_is_compared_with_as_many_steps_in_one_place(small: Small) -> None:
    stage = {"kind": "tune", "rounds": 1, "steps": 2, "length": 16, "batches": [1], "ranks": [2], "bits": [32]}
    run = small.undisturbed(stages=[small.spec()["stages"][0], stage], evaluate__centralized=True)
    wanted = centralized_job(load(run / "job.toml")).stages[1]
    assert isinstance(wanted, TuneStage)
    assert (wanted.planner, wanted.parametrization, wanted.steps) == ("uniform", "lora", 2 * len(CLIENTS))
    plan = json.loads((run / CENTRALIZED / "plan-1-tune.json").read_text())
    assert plan["clients"].keys() == {CENTRALIZED}
    found = read(run)
    assert found.centralized.keys() == set(found.texts)
    assert measurements(run / CENTRALIZED)[0, None, None, "perplexity/held-0"] != found.centralized["held-0"], (
        "after the last stage"
    )


def test_a_run_that_is_killed_in_it_goes_on_in_it(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = small.job("killed", evaluate__centralized=True)
    process("run", job, "--out", out, "--quiet", moment=Moment("os.rename", "*/centralized/pruning.json"))
    assert (out / "model").is_dir()
    assert not (out / CENTRALIZED / "model").exists()
    assert cli("run", job, "--out", out, "--resume", "--quiet")[0] == 0
    whole = small.undisturbed(evaluate__centralized=True)
    assert digest(out / CENTRALIZED) == digest(whole / CENTRALIZED)
    assert measurements(out) == measurements(whole)


def test_a_federation_refuses_to_put_text_in_one_place(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    text = 'name = "x"\n[model]\npath = "m"\n[[stages]]\nkind = "prune"\nsparsity = 0.5\n[evaluate]\ncentralized = true\n'
    file.write_text(text)
    with pytest.raises(FedgroveError, match=r"evaluate\.centralized: in a federation no text may be put in one place"):
        load_federated(file, sites=["a", "b"])
    file.write_text(text.replace("true", "false"))
    assert load_federated(file, sites=["a", "b"]).evaluate.centralized is False
