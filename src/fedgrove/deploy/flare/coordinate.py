"""The server's part of a run: the job is opened, the sites agree to it, it is run, the result goes where it is wanted."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from fedgrove import run as server
from fedgrove.deploy.flare.files import SERVER, ServerFile, model_folder, read
from fedgrove.deploy.flare.site import DONE, JOIN, RESULT
from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.export import Texts, export
from fedgrove.job import FederatedJob, load_federated
from fedgrove.models.digest import digests
from fedgrove.progress import Listener
from fedgrove.report.stage_reports import stage_files
from fedgrove.rounds.collect import ask
from fedgrove.rounds.wire import Info, WireError
from fedgrove.runfolder import RunFolder
from fedgrove.stages.prune.plan import Capabilities

JOB, TEXTS, FACTS, STATE, SAID = "job.toml", "texts", "federation.json", "state.json", "said.txt"
FETCHED = (
    "report.html", "metrics.jsonl", "examples.jsonl", "ledger.jsonl", *stage_files(), "samples.json", JOB, SAID, "adapter",
    "model",
)  # fmt: skip
Reach = Callable[[list[str], str, float], Engine]  # the members, the name of their working files, seconds to fetch an ask


class Recorder(Listener):
    """Keeps every event of a run, for whoever asks from afar; what is to be read afterwards goes into a file too."""

    def __init__(self) -> None:
        self.events: list[tuple[str, list[Any]]] = []
        self.file: Path | None = None
        self.cards: dict[str, Any] = {}

    def say(self, line: str) -> None:
        self.events.append(("say", [line]))
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def step(self, what: str, done: float = 0, of: float = 0) -> None:
        self.events.append(("step", [what, done, of]))

    def asking(self, clients: Sequence[str]) -> None:
        self.events.append(("asking", [list(clients)]))

    def asked(self, client: str, num_bytes: int) -> None:
        self.events.append(("asked", [client, num_bytes]))

    def answered(self, client: str, num_bytes: int) -> None:
        self.events.append(("answered", [client, num_bytes]))

    def measured(self, line: Mapping[str, Any]) -> None:
        self.events.append(("measured", [dict(line)]))


def conduct(kit: Path, config: Path, leave: Path, resume: bool, reach: Reach, recorder: Recorder) -> str | None:
    """Runs a submitted job.

    Args:
        kit: the server's folder.
        config: where the job's files lie as they were submitted.
        leave: where the operator fetches from; the result is put there.
        resume: continue the run of this name.
        reach: makes the engine.
        recorder: gets the events of the run.

    Returns:
        The one line that says why it ended early, else None.
    """
    state: dict[str, str] = {"state": "ended"}
    folder = None
    try:
        own = read(kit / SERVER, ServerFile)
        torch.set_num_threads(own.threads or os.cpu_count() or 1)
        job, model = open_job(kit, config, own)
        folder = kit / "runs" / job.name
        run = RunFolder(folder, job, resume=resume, watch=recorder)
        try:
            recorder.file = folder / SAID
            run_job(job, model, own, reach, run, recorder)
        finally:
            run.close()
    except FedgroveError as fault:
        state = {"state": "failed", "line": str(fault)}
    except Exception as fault:
        state = {"state": "failed", "line": f"{type(fault).__name__} at the server; the trace is in its log"}
        raise
    finally:
        recorder.say(state.get("line", "the run has ended"))
        _offer(folder, leave / "run", state)
    return state.get("line")


def open_job(kit: Path, config: Path, own: ServerFile) -> tuple[FederatedJob, str]:
    """The submitted job with the server's own copy of the model, and the model's name; no submitted path is followed."""
    texts = config / TEXTS
    kept = kit / TEXTS
    if texts.is_dir():
        for file in texts.iterdir():  # their paths are part of the job, which must be the same when it is continued
            kept.mkdir(exist_ok=True)
            shutil.copyfile(file, kept / file.name)
    job = load_federated(config / JOB, texts=kept)
    if any(text.path.parent != kept.resolve() for text in job.evaluate.data):
        raise FedgroveError("evaluate.data: a held-out text travels with the job; a path at the server is not read")
    copy = job.model.model_copy(update={"path": str(model_folder(own.models, job.model.path, kit))})
    return job.model_copy(update={"model": copy}), job.model.path


def run_job(job: FederatedJob, model: str, own: ServerFile, reach: Reach, run: RunFolder, recorder: Recorder) -> None:
    """From the members' agreement to the result."""
    facts = run.path / FACTS
    if not facts.is_file():
        run.write_json(FACTS, {"run": f"{job.name[:40]}-{secrets.token_hex(8)}"})
    named = str(json.loads(facts.read_text(encoding="utf-8"))["run"])
    agreed = agree(job, model, reach([client.name for client in job.clients], named, own.grace), run)
    recorder.cards = {site: info["card"] for site, info in agreed.items()}
    engine = reach(list(agreed), named, own.grace)
    server.main(job, engine, run)
    if job.result == "sites":
        give(engine, run, [site for site, info in agreed.items() if info["result"]])
    for _ in engine.ask(DONE, dict.fromkeys(engine.sites(), _empty()), run.job.rounds.timeout):
        pass  # a site that does not hear it deletes its working files another time


def agree(job: FederatedJob, model: str, engine: Engine, run: RunFolder) -> dict[str, Info]:
    """Asks the members whether they take part in this job on the model of that name; what those say who do.

    Raises:
        FedgroveError: fewer agree than the quorum; names the first that does not, and why.
    """
    run.step("asking the sites whether they take part")
    terms = {
        "name": job.name,
        "model": model,
        "dtype": job.model.dtype,
        "digests": digests(server.open_model(job.model), run.path / "work" / "digests.json"),
        "stages": [stage.model_dump(mode="json") for stage in job.stages],
        "secure": job.privacy.secure_aggregation,
        "alone": job.evaluate.alone,
        "clients": engine.sites(),
        "clock": time.time(),
    }

    def check(client: str, tensors: dict[str, torch.Tensor], info: Info) -> None:
        if not isinstance(info.get("result"), bool) or not isinstance(info.get("card"), dict):
            raise WireError("it neither agrees nor refuses")
        try:
            Capabilities(**{**info["card"], "speed": 1.0})  # "measure" becomes a number when it is planned
        except ValidationError as fault:
            raise WireError("its card is not understood") from fault

    answers = ask(engine, run, JOIN, {site: ({}, terms) for site in engine.sites()}, stage=0, round_=0, check=check)
    return {site: info for site, _, info in answers}


def give(engine: Engine, run: RunFolder, wants: list[str]) -> None:
    """Sends the finished model, packed, to those who want it."""
    packed = run.path / "work" / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    export(run.path / "model", "packed", packed, Texts())
    parts = sorted(packed.iterdir())
    for file in parts:
        run.step(f"giving the result to {', '.join(wants) or 'nobody: no site asks for it'}")
        content = torch.from_numpy(np.fromfile(file, np.uint8))
        info = {"file": file.name, "last": file == parts[-1]}
        messages = dict.fromkeys(wants, ({"bytes": content}, info))
        for _ in ask(engine, run, RESULT, messages, stage=0, round_=0, check=lambda client, tensors, told: None):
            pass
    shutil.rmtree(run.path / "work", ignore_errors=True)


def _empty() -> bytes:
    from fedgrove.rounds import wire

    return wire.pack({}, {})


def _offer(run: Path | None, out: Path, state: dict[str, str]) -> None:
    """Links what the operator may fetch into FLARE's folder of the job, which FLARE keeps and gives out."""
    out.mkdir(parents=True, exist_ok=True)
    (out / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    if run is None:
        return
    for name in [*FETCHED, *(file.name for file in run.glob("plan-*.json"))]:
        found = [run / name] if (run / name).is_file() else sorted((run / name).rglob("*"))
        for file in found:
            if file.is_file():
                target = out / file.relative_to(run)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, target)
