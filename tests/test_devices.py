"""Jobs whose clients and server compute on another device than the CPU: an emulated one anywhere, and a GPU where there is one.

FEDGROVE_TEST_GPU=1 pytest tests/test_devices.py tests/test_kernels.py
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from elsewhere import second_device
from fedgrove.job.load import load
from fedgrove.job.tables import Job
from fedgrove.run import local_engine, run_job
from fedgrove.runfolder import RunFolder
from small import LENGTH, Small, make_model

PRUNE = {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": 2, "length": LENGTH, "compute_dtype": "float32"}
SUMS = {**PRUNE, "aggregation": "pooled"}
CUT = {"kind": "structured", "heads": 0.0, "samples": 3, "length": LENGTH}
TUNE = {
    "kind": "tune", "planner": "uniform", "rounds": 1, "steps": 1, "length": LENGTH, "batches": [1], "bits": [32],
    "ranks": [2, 16],
}  # fmt: skip
LORA = {**TUNE, "parametrization": "lora"}
SEEDS = {
    "kind": "tune", "method": "seeds", "rounds": 1, "steps": 1, "length": LENGTH, "batches": [1], "learning_rate": 1e-3,
    "perturbation": 2**-9,
}  # fmt: skip
SECURE = {"secure_aggregation": True}
JOBS: dict[str, dict[str, Any]] = {
    "votes": {"stages": [PRUNE]},
    "votes of sparsegpt, two rounds": {"stages": [{**PRUNE, "pruner": "sparsegpt", "rounds": 2}]},
    "votes of alps": {"stages": [{**PRUNE, "pruner": "alps"}]},
    "votes, masked": {"stages": [PRUNE], "privacy": SECURE},
    "votes, mended": {"stages": [{**PRUNE, "mend": "dsnot"}]},
    "plain average": {"stages": [{**PRUNE, "aggregation": "fedavg", "pruner": "magnitude"}]},
    "fedprllm, owl": {"stages": [{**PRUNE, "aggregation": "fedprllm", "allocation": "owl"}]},
    "dsnot": {"stages": [{**PRUNE, "pruner": "dsnot"}]},
    "sums": {"stages": [SUMS]},
    "sums, block by block": {"stages": [{**SUMS, "source": "sequential", "pruner": "sparsegpt"}]},
    "sums, mixed": {"stages": [{**SUMS, "pruner": "sparsegpt", "mixed": True}]},
    "sums, moments": {"stages": [{**SUMS, "pruner": "dsnot"}]},
    "sums, masked": {"stages": [{**SUMS, "pruner": "sparsegpt"}], "privacy": SECURE},
    "sums, owl": {"stages": [{**SUMS, "allocation": "owl"}]},
    "structured": {"stages": [CUT]},
    "fedpipe": {"stages": [{**TUNE, "planner": "fedpipe", "importance_steps": 2}]},
    "lora": {"stages": [{**LORA, "rounds": 2}]},
    "lora, masked": {"stages": [{**LORA, "precision": "fixed", "aggregation": "ffa_lora"}], "privacy": SECURE},
    "full": {"stages": [{**TUNE, "parametrization": "full"}]},
    "ia3": {"stages": [{**TUNE, "parametrization": "ia3"}]},
    "seeds": {"stages": [PRUNE, SEEDS]},
    "pruned and tuned": {"stages": [PRUNE, LORA], "evaluate": {"data": ["held-0.txt"], "length": 32, "windows": 2}},
    "adapters of one's own": {"stages": [{**LORA, "personal": 0.25}]},
    "pulled, and alone": {
        "stages": [{**LORA, "personal": 0.25, "personal_pull": 0.1}],
        "evaluate": {"data": ["held-0.txt"], "length": 32, "windows": 2, "alone": True},
    },
}
NOISY: dict[str, dict[str, Any]] = {  # no two runs are alike
    "sums": {"stages": [{**SUMS, "epsilon": 9.0}], "privacy": SECURE},
    "dp_sgd": {"stages": [{**LORA, "epsilon": 1.0, "dp_unit": "window"}]},
}
DEVICES = ["emulated", *(["cuda:0"] if os.environ.get("FEDGROVE_TEST_GPU") else [])]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A federation whose model is half as wide: some pruners go column by column, and every step passes through Python."""
    folder = tmp_path_factory.mktemp("narrow")
    return Small(folder, make_model(folder / "model", hidden_size=32, intermediate_size=48))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", JOBS)
def test_the_model_is_that_of_a_cpu(name: str, device: str, narrow: Small, tmp_path: Path) -> None:
    """Rounding may differ, so a tenth of the entries may: of two close scores another may win, and what follows differs."""
    job = job_of(narrow, f"elsewhere-{name}", JOBS[name])
    here, there = model(job, tmp_path / "here", "cpu"), model(job, tmp_path / "there", device)
    assert here.keys() == there.keys()
    for key, tensor in here.items():
        assert there[key].shape == tensor.shape
        close = torch.isclose(there[key], tensor, rtol=1e-3, atol=1e-3)
        assert close.double().mean() > 0.9, key


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NOISY)
def test_noise_is_added_on_any_device(name: str, device: str, narrow: Small, tmp_path: Path) -> None:
    job = job_of(narrow, f"noisy-{name}", NOISY[name])
    assert all(torch.isfinite(tensor).all() for tensor in model(job, tmp_path / "there", device).values())


def test_the_emulated_device_is_as_strict_as_a_gpu() -> None:
    with second_device() as device:
        far, near = torch.ones(2, device=device), torch.ones(2)
        assert str((far + 1).device) == device
        assert (far + torch.tensor(2.0)).cpu().tolist() == [3.0, 3.0], "a single number may come from anywhere"
        for mixed in (lambda: far + near, lambda: near * far, lambda: torch.stack([near, far])):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                mixed()
        with pytest.raises(RuntimeError):
            far.numpy()


def job_of(small: Small, name: str, changes: dict[str, Any]) -> Job:
    """A job of two clients, of three where their sums are masked: no device depends on their number."""
    clients = small.spec()["clients"]
    fewer = clients if "privacy" in changes else clients[:2]
    return load(small.job(name, **{"evaluate": {}, **changes, "clients": fewer}, model__dtype="float32"))


def model(job: Job, folder: Path, device: str) -> dict[str, Tensor]:
    """Runs a job; clients and server compute on the device."""
    run = RunFolder(folder, job)
    try:
        with second_device() if device == "emulated" else nullcontext(device) as name:
            run_job(job, local_engine(job, run.path / "clients", devices=[name]), run, name)
    finally:
        run.close()
    return load_file(folder / "model" / "model.safetensors")
