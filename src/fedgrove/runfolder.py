"""The run folder: everything that was decided, measured and sent, written so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import tomllib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import filelock

from fedgrove.errors import FedgroveError
from fedgrove.events import Listener, Measured, Message, OnProgress, Phase, Requested, Responded, announce
from fedgrove.files import read_lines, write_atomically
from fedgrove.job.tables import Job


class RunFolder:
    """A run folder.

    Args:
        path: the folder; made if it is not there.
        job: what is run. It is written to ``job.toml``; an existing run is continued only by the same
            job (``rounds`` may differ).
        resume: continue what is there.
        listener: gets every event of the run.
        shown: what messages call the folder; default: ``--out PATH``.
        another: what to do where the folder cannot be used.
        beside: files that the caller writes there too; they alone do not make it a run.

    Raises:
        FedgroveError: the folder holds something else, another job, or a run that is still going on.
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
        if started and _what(job_file.read_text(encoding="utf-8")) != _what(job.dumps()):
            raise FedgroveError(f"--resume: the job differs from {of}", f"run that one, or {another}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise FedgroveError(f"{shown}: another process is running there", f"wait for it or {another}") from error
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
        """The same for every beginning of the same job, whatever its folder."""
        return hashlib.sha256(self.job.model_dump_json(exclude={"rounds"}).encode()).hexdigest()  # those may change on the way

    def message(self, text: str) -> None:
        """A line for people, to be read afterwards too: a client that failed, or was left out."""
        self.listener.on_event(Message(text))

    def phase(self, phase: Phase) -> OnProgress:
        """What begins now; see :func:`fedgrove.events.announce` for the result."""
        return announce(self.listener, phase)

    def close(self) -> None:
        """Lets the folder go."""
        (self.path / ".lock").unlink(missing_ok=True)  # while it is held: nobody else's lock may be removed
        self._lock.release()

    def write_text(self, name: str, text: str) -> None:
        """Writes a file, completely or not at all."""
        write_atomically(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file, completely or not at all."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def log(self, stage: int | None, round_: int | None, client: str | None, name: str, value: float) -> None:
        """One line of ``metrics.jsonl``. ``stage`` None: the model as it came."""
        measured = Measured(time.time(), stage, round_, client, name, value)
        self._append("metrics.jsonl", asdict(measured))
        self.listener.on_event(measured)

    def keep(self, stage: int | None, client: str | None, name: str, parts: Sequence[Sequence[float]]) -> None:
        """One line of ``examples.jsonl``: what a measurement is the mean of, (sum, how many) of each window or record.

        It is written before the measurement, so that whoever finds the one finds the other.
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
        """One line of ``ledger.jsonl``: a message as it was sent, with its modelled seconds where a stage has a clock."""
        line = {"stage": stage, "round": round_, "client": client, "direction": direction, "kind": kind, "bytes": num_bytes}
        self._append("ledger.jsonl", line | dict(modelled))
        self.listener.on_event((Requested if direction == "down" else Responded)(client, num_bytes))

    def metrics(self) -> list[dict[str, Any]]:
        """What :meth:`log` wrote."""
        return read_lines(self.path / "metrics.jsonl")

    def overlay(self, stage: int, round_: int) -> Path:
        """Where a round's finished blocks lie. A file there is a finished block: this is how a run is continued."""
        return self.path / "work" / f"stage-{stage}" / f"round-{round_}"

    def has_model(self) -> bool:
        """Whether the result is there already."""
        return (self.path / "model").is_dir()

    def finish(self) -> None:
        """Lets the working files go; the result stays, and what clients keep for themselves."""
        shutil.rmtree(self.path / "work", ignore_errors=True)
        for file in (self.path / "clients").glob("*/*"):
            if file.name != "personal":
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        for folder in (*(self.path / "clients").glob("*"), self.path / "clients"):
            with suppress(OSError):  # it is not empty
                folder.rmdir()

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _void(folder: Path, beside: Collection[str]) -> bool:
    """Whether there is nothing in a folder, or what a run left that ended before it had computed anything.

    So a job or a text that was refused can be fixed and run again under the same name.
    """
    left = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    refused = {"job.toml", "ledger.jsonl"} <= left
    return left <= {".lock", "job.toml.partial", *beside} | (
        {"job.toml", "ledger.jsonl", "clients", "work", "tensorboard", "mlflow"} if refused else set()
    )


def _what(job: str) -> dict[str, Any]:
    """The part of a job that decides what comes out; how long to wait for whom may change when a run is continued."""
    return {key: value for key, value in tomllib.loads(job).items() if key != "rounds"}


def unfinished(run: Path) -> FedgroveError:
    """What to raise of a run that has not ended."""
    return FedgroveError(f"{run}: this run has not ended", f"continue it: fedgrove run {run / 'job.toml'} --out {run} --resume")


def _drop_cut_line(path: Path) -> None:
    """Drops a last line that a kill cut short."""
    if path.is_file():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])
