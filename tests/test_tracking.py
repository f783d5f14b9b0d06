"""The metrics in TensorBoard and MLflow are those of the run, read back with their own readers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from small import Small, cli, complaint, measurements


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_every_measurement_is_handed_on(small: Small, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(kind)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    assert cli("run", small.job(**small.two_texts()), "--out", run, "--quiet", "--track", kind)[0] == 0
    wanted = {
        "/".join(["dense" if stage is None else f"stage-{stage}", *([client] if client else []), name]): value
        for (stage, _, client, name), value in measurements(run).items()
    }
    assert len(wanted) > 10
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "tensorboard")).Reload()
        found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    else:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=(run / "mlflow").as_uri())
        (told,) = client.search_runs([client.get_experiment_by_name("fedgrove").experiment_id])
        assert (told.info.run_name, told.info.status) == ("small", "FINISHED")
        found = told.data.metrics
    assert found == pytest.approx(wanted, rel=1e-6)


def test_nothing_is_handed_on_by_default_and_what_is_missing_is_one_line(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not {"tensorboard", "mlflow"} & {file.name for file in small.undisturbed().iterdir()}
    for kind, module in (("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")):
        monkeypatch.setitem(sys.modules, module, None)
        told = complaint("run", small.job(), "--out", tmp_path / kind, "--track", kind)
        assert told.startswith(f'--track {kind}: pip install "fedgrove[{kind}]"')
