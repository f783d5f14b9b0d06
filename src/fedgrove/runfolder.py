"""The run folder: plans, measurements and message sizes of a run, written so that a killed run can be continued."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import time
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import filelock

from fedgrove.errors import FedgroveError
from fedgrove.events import Listener, Measured, Message, OnProgress, Phase, Requested, Responded, announce
from fedgrove.files import TRACE, read_lines, write_atomically
from fedgrove.job.tables import Job


class RunFolder:
    """A run folder.

    Args:
        path: the folder; created if it does not exist.
        job: the job. It is written to ``job.toml``; an existing run is continued only with the same job (``rounds`` may
            differ).
        resume: continue an existing run.
        listener: receives every event of the run.
        shown: the name of the folder in messages; default: ``--out PATH``.
        another: what to do if the folder cannot be used.
        beside: files that the caller writes into the folder, too; they alone do not make it a run.

    Raises:
        FedgroveError: the folder contains something else, a run of another job, a run although ``resume`` is false, or
            a run that is still in progress.
    """

    def __init__(
        self,
        path: Path,
        job: Job,
        *,
        resume: bool = False,
        listener: Listener | None = None,
        shown: str | None = None,
        another: str = "name another folder",
        beside: Collection[str] = (),
    ):
        self.path = path.resolve()
        self.job = job
        self.listener = listener or Listener()
        job_file = self.path / "job.toml"
        of = str(job_file) if shown is None else f"that of {shown}"
        shown = shown or f"--out {path}"
        if self.path.is_file():
            raise FedgroveError(f"{shown}: this is a file", "name a folder")
        void = _void(self.path, beside)
        started = job_file.is_file() and not void
        if started and not resume:
            raise FedgroveError(f"{shown}: a run is there already", f"continue it with --resume or {another}")
        if not started and not void:
            raise FedgroveError(f"{shown}: the folder is not empty and holds no run", another)
        differs = _difference(_what(job_file.read_text(encoding="utf-8")), _what(job.dumps())) if started else None
        if differs is not None:
            raise FedgroveError(f"--resume: the job differs from {of} in {differs}", f"run that one, or {another}")
        self._lock = filelock.FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise FedgroveError(f"{shown}: another process is running there", f"wait for it or {another}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise FedgroveError(f"{shown}: nothing can be written there ({error.strerror})", another) from error
        self.write_text("job.toml", job.dumps())
        if void:
            for name in beside:
                (self.path / name).unlink(missing_ok=True)
            (self.path / "ledger.jsonl").write_text("")
        else:
            for name in ("metrics.jsonl", "ledger.jsonl", "examples.jsonl"):
                _drop_cut_line(self.path / name)

    @property
    def name(self) -> str:
        """A hash of the job without ``rounds``: the same for every run of the same job, in any folder."""
        return hashlib.sha256(self.job.model_dump_json(exclude={"rounds"}).encode()).hexdigest()  # may change on resume

    def message(self, text: str) -> None:
        """Reports a line that stays visible: a client failed, or was left out."""
        self.listener.on_event(Message(text))

    def phase(self, phase: Phase) -> OnProgress:
        """Reports the work that begins now; see :func:`fedgrove.events.announce` for the result."""
        return announce(self.listener, phase)

    def close(self) -> None:
        """Releases the lock of the folder."""
        (self.path / ".lock").unlink(missing_ok=True)  # before the release: afterwards it may be another process's lock
        self._lock.release()

    def write_text(self, name: str, text: str) -> None:
        """Writes a file atomically."""
        write_atomically(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file atomically."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def log(self, stage: int | None, round_: int | None, client: str | None, name: str, value: float) -> None:
        """Adds a line to ``metrics.jsonl``. ``stage`` None: the base model; ``round_`` None: after the last round."""
        measured = Measured(time.time(), stage, round_, client, name, value)
        self._append("metrics.jsonl", asdict(measured))
        self.listener.on_event(measured)

    def keep(self, stage: int | None, client: str | None, name: str, parts: Sequence[Sequence[float]]) -> None:
        """Adds a line to ``examples.jsonl``: (sum, count) of each window or record that a measurement is the mean of.

        It is written before the measurement, so that every measurement in ``metrics.jsonl`` has its line.
        """
        self._append("examples.jsonl", {"stage": stage, "client": client, "name": name, "parts": parts})

    def account(
        self,
        stage: int,
        round_: int,
        client: str,
        direction: Literal["up", "down"],
        kind: str,
        num_bytes: int,
        modelled: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Adds a line to ``ledger.jsonl``: a message's bytes, and its modeled seconds if the stage has a clock."""
        line = {"stage": stage, "round": round_, "client": client, "direction": direction, "kind": kind, "bytes": num_bytes}
        self._append("ledger.jsonl", line | dict(modelled))
        self.listener.on_event((Requested if direction == "down" else Responded)(client, num_bytes))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``."""
        return read_lines(self.path / "metrics.jsonl")

    def overlay(self, stage: int, round_: int) -> Path:
        """The folder of a round's finished blocks. Each file there is a finished block, which a resumed run skips."""
        return self.path / "work" / f"stage-{stage}" / f"round-{round_}"

    def has_model(self) -> bool:
        """Whether the resulting model has been written."""
        return (self.path / "model").is_dir()

    def finish(self) -> None:
        """Removes the working files; keeps the result, and the clients' personal adapters (``personal``)."""
        shutil.rmtree(self.path / "work", ignore_errors=True)
        for file in (self.path / "clients").glob("*/*"):
            if file.name != "personal":
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        for folder in (*(self.path / "clients").glob("*"), self.path / "clients"):
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def planning_folder(job: Job, listener: Listener | None = None) -> Iterator[RunFolder]:
    """A run folder for a plan without a run. It is removed afterwards, unless it holds the trace of an error."""
    path = Path(tempfile.mkdtemp(prefix="fedgrove-plan-"))
    try:
        with closing(RunFolder(path / "run", job, listener=listener)) as run:
            yield run
    finally:
        if not any(path.rglob(TRACE)):
            shutil.rmtree(path, ignore_errors=True)


def _void(folder: Path, beside: Collection[str]) -> bool:
    """Whether a folder is empty, or has only the files of a run that ended before it had computed anything.

    So after an error in a job or a text is fixed, the same folder can be used again.
    """
    left = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    refused = {"job.toml", "ledger.jsonl"} <= left
    return left <= {".lock", "job.toml.partial", *beside} | (
        {"job.toml", "ledger.jsonl", "clients", "work", "tensorboard", "mlflow"} if refused else set()
    )


def _what(job: str) -> dict[str, Any]:
    """The part of a job that must not change when a run is continued: all tables except ``rounds``."""
    return {key: value for key, value in tomllib.loads(job).items() if key != "rounds"}


def _difference(one: Any, other: Any, at: str = "") -> str | None:
    """The first key, such as ``stages.0.sparsity``, in which two jobs differ; None: they are equal."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return None if one == other else at
    for key in {**one, **other}:
        where = f"{at}.{key}" if at else str(key)
        differs = _difference(one[key], other[key], where) if key in one and key in other else where
        if differs is not None:
            return differs
    return None


def unfinished(run: Path) -> FedgroveError:
    """The error for a run that has not ended."""
    return FedgroveError(f"{run}: this run has not ended", f"continue it: fedgrove run {run / 'job.toml'} --out {run} --resume")


def _drop_cut_line(path: Path) -> None:
    """Removes an incomplete last line, which a killed process can leave."""
    if path.is_file():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])
