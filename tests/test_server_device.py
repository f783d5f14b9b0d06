"""The server computes where it is told to: every model that it loads is loaded there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedgrove.job.load import load
from fedgrove.models.blocks import Decoder
from fedgrove.run import local_engine, run_job
from fedgrove.runfolder import RunFolder
from small import LENGTH, Small

TUNE = {"kind": "tune", "method": "lora", "rounds": 1, "steps": 1, "length": LENGTH, "batches": [1], "ranks": [2], "bits": [32]}


@pytest.mark.parametrize("aggregation", ["fedspallm", "pooled"])
def test_every_stage_and_measurement_gets_the_device(
    aggregation: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``cpu:0`` is the CPU under another name, which nobody asks for by accident."""
    prune = {"kind": "prune", "pruner": "wanda", "sparsity": 0.5, "samples": 2, "length": LENGTH, "aggregation": aggregation}
    changes: dict[str, Any] = {"stages": [prune, {**TUNE, "eval_every": 1}]}
    job = load(small.job(f"device-{aggregation}", **changes))
    loaded: list[str] = []
    original = Decoder.loaded

    def noting(self: Decoder, *args: Any) -> Any:
        loaded.append(str(self.device))
        return original(self, *args)

    monkeypatch.setattr(Decoder, "loaded", noting)
    run = RunFolder(tmp_path / "run", job)
    try:
        engine = local_engine(job, run.path / "clients", devices=["cpu"])
        run_job(job, engine, run, "cpu:0")
    finally:
        run.close()
    assert "cpu:0" in loaded, "the server's own: evaluation, and the pass that finds the scale of inputs"
    assert "cpu" in loaded, "the clients'"
