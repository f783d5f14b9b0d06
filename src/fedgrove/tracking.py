"""Logs the metrics of a run to TensorBoard or MLflow as they are measured. Off by default; needs an extra."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedgrove.errors import FedgroveError
from fedgrove.events import Event, Listener, Measured


def track(kind: str, name: str, folder: Path) -> Listener:
    """A listener that logs every new line of ``metrics.jsonl``.

    Each measurement is logged once, by the process that made it: a resumed run does not log earlier ones again.

    Args:
        kind: "tensorboard" or "mlflow".
        name: the name of the run.
        folder: the run folder; by default, files are written to ``tensorboard`` or ``mlflow`` in it.

    Raises:
        FedgroveError: the package is not installed.
    """
    return TRACKERS[kind](name, folder)


class _Tracker(Listener):
    """Calls ``write`` with (tag, value, round) for every measurement."""

    def __init__(self, write: Callable[[str, float, int], None], close: Callable[[], None]):
        self._write = write
        self._close = close

    def on_event(self, event: Event) -> None:
        if isinstance(event, Measured):
            stage = "dense" if event.stage is None else f"stage-{event.stage}"
            tag = [stage, *([event.client] if event.client else []), event.name]
            self._write("/".join(tag), float(event.value), event.round or 0)

    def close(self) -> None:
        self._close()


def _tensorboard(name: str, folder: Path) -> Listener:
    """Writes to RUN/tensorboard; ``tensorboard --logdir RUN/tensorboard`` shows it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FedgroveError(f'--track tensorboard: pip install "fedgrove[tensorboard]" ({error.name} is missing)') from error
    writer: Any = SummaryWriter(str(folder / "tensorboard"))
    return _Tracker(writer.add_scalar, writer.close)


def _mlflow(name: str, folder: Path) -> Listener:
    """Logs to ``MLFLOW_TRACKING_URI`` if that is set, else to files in RUN/mlflow."""
    try:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
    except ImportError as error:
        raise FedgroveError(f'--track mlflow: pip install "fedgrove[mlflow]" ({error.name} is missing)') from error
    where = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").resolve().as_uri()
    client = MlflowClient(tracking_uri=where)
    existing = client.get_experiment_by_name("fedgrove")
    experiment = existing.experiment_id if existing else client.create_experiment("fedgrove")
    run = client.create_run(experiment, run_name=name).info.run_id

    def write(key: str, value: float, step: int) -> None:
        client.log_metric(run, key, value, step=step)

    return _Tracker(write, lambda: client.set_terminated(run))


TRACKERS: dict[str, Callable[[str, Path], Listener]] = {"tensorboard": _tensorboard, "mlflow": _mlflow}
