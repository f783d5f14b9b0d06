"""The server's part of a run: the job is opened, the sites agree to it, it is run, the result goes where it is wanted."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgrove import events
from fedgrove.deploy.flare.exchanges.done import EndRun
from fedgrove.deploy.flare.exchanges.join import Joined, JoinRun
from fedgrove.deploy.flare.exchanges.result import CONTENT, DeliverResult
from fedgrove.deploy.flare.files import SERVER, ServerFile, model_folder, read
from fedgrove.deploy.flare.policy import Terms
from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.events import Event, Listener, Phase
from fedgrove.export import Texts, export
from fedgrove.job.load import load_federated
from fedgrove.job.tables import FederatedJob
from fedgrove.models.digest import digests
from fedgrove.rounds import wire
from fedgrove.rounds.collect import collect
from fedgrove.rounds.request import Message
from fedgrove.run import open_model, run_job
from fedgrove.runfolder import RunFolder

JOB, HELD_OUT, FACTS, STATE, SAID = "job.toml", "texts", "federation.json", "state.json", "said.txt"
FETCHED = (
    "report.html", "metrics.jsonl", "examples.jsonl", "ledger.jsonl", "pruning.json", "structured.json", "samples.json",
    JOB, SAID, "adapter", "model",
)  # fmt: skip
Connect = Callable[[list[str], str, float], Engine]  # clients, the name of their working files, seconds to fetch a request


class Recorder(Listener):
    """Keeps every event of a run as JSON, for operators who ask from afar; messages go into a file too.

    Attributes:
        events: as :func:`fedgrove.events.to_json` writes them.
        file: for the messages; None: the run folder is not there yet.
        capabilities: of the sites, once they have agreed.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.file: Path | None = None
        self.capabilities: dict[str, Any] = {}

    def on_event(self, event: Event) -> None:
        self.events.append(events.to_json(event))
        if isinstance(event, events.Message) and self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(event.text + "\n")

    def message(self, text: str) -> None:
        """A line of the server itself."""
        self.on_event(events.Message(text))


def coordinate(kit: Path, config: Path, results: Path, resume: bool, connect: Connect, recorder: Recorder) -> str | None:
    """Runs a submitted job.

    Args:
        kit: the server's folder.
        config: where the job's files lie as they were submitted.
        results: where the operator fetches from; the result is put there.
        resume: continue the run of this name.
        connect: makes the engine.
        recorder: gets the events of the run.

    Returns:
        The one line that says why it ended early, else None.
    """
    state: dict[str, str] = {"state": "ended"}
    folder = None
    try:
        settings = read(kit / SERVER, ServerFile)
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        job, model = open_job(kit, config, settings)
        folder = kit / "runs" / job.name
        run = RunFolder(folder, job, resume=resume, listener=recorder)
        try:
            recorder.file = folder / SAID
            run_with_sites(job, model, settings, connect, run, recorder)
        finally:
            run.close()
    except FedgroveError as error:
        state = {"state": "failed", "line": str(error)}
    except Exception as error:
        state = {"state": "failed", "line": f"{type(error).__name__} at the server; the trace is in its log"}
        raise
    finally:
        recorder.message(state.get("line", "the run has ended"))
        _offer(folder, results / "run", state)
    return state.get("line")


def open_job(kit: Path, config: Path, settings: ServerFile) -> tuple[FederatedJob, str]:
    """The submitted job with the server's copy of the model, and the model's name; no submitted path is followed."""
    submitted, texts = config / HELD_OUT, kit / HELD_OUT
    if submitted.is_dir():
        for file in submitted.iterdir():  # their paths are part of the job, which must be the same when it is continued
            texts.mkdir(exist_ok=True)
            shutil.copyfile(file, texts / file.name)
    job = load_federated(config / JOB, texts=texts)
    if any(text.path.parent != texts.resolve() for text in job.evaluate.data):
        raise FedgroveError("evaluate.data: a held-out text travels with the job; a path at the server is not read")
    copy = job.model.model_copy(update={"path": str(model_folder(settings.models, job.model.path, kit))})
    return job.model_copy(update={"model": copy}), job.model.path


def run_with_sites(
    job: FederatedJob, model: str, settings: ServerFile, connect: Connect, run: RunFolder, recorder: Recorder
) -> None:
    """From the sites' agreement to the result.

    Args:
        model: the name by which sites know the job's model.
    """
    facts = run.path / FACTS
    if not facts.is_file():
        run.write_json(FACTS, {"run": f"{job.name[:40]}-{secrets.token_hex(8)}"})
    name = str(json.loads(facts.read_text(encoding="utf-8"))["run"])
    joined = join(job, model, connect([client.name for client in job.clients], name, settings.grace), run)
    recorder.capabilities = {site: reply.capabilities.model_dump(mode="json") for site, reply in joined.items()}
    engine = connect(list(joined), name, settings.grace)
    run_job(job, engine, run, settings.device)
    if job.result == "sites":
        deliver(engine, run, [site for site, reply in joined.items() if reply.result])
    end = wire.pack({}, {"request": EndRun().model_dump(mode="json")})
    for _ in engine.request(EndRun.KIND, dict.fromkeys(engine.clients(), end), run.job.rounds.timeout):
        pass  # a site that does not hear it deletes its working files another time


def join(job: FederatedJob, model: str, engine: Engine, run: RunFolder) -> dict[str, Joined]:
    """Asks the sites whether they take part in this job on the model of that name; what those reply who do.

    Raises:
        FedgroveError: fewer agree than the quorum; names the first that does not, and why.
    """
    run.phase(Phase("join", title="asking the sites whether they take part"))
    terms = Terms(
        name=job.name,
        model=model,
        dtype=job.model.dtype,
        digests=digests(open_model(job.model), run.path / "work" / "digests.json"),
        stages=job.stages,
        secure=job.privacy.secure_aggregation,
        alone=job.evaluate.measures_alone,
        clients=tuple(engine.clients()),
    )
    message = Message(JoinRun(terms=terms, clock=time.time()))
    joined = {}
    for site, _, reply in collect(engine, run, dict.fromkeys(engine.clients(), message)):
        assert isinstance(reply, Joined)
        joined[site] = reply
    return joined


def deliver(engine: Engine, run: RunFolder, sites: list[str]) -> None:
    """Sends the finished model, packed, to the sites that want it."""
    packed = run.path / "work" / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    export(run.path / "model", "packed", packed, Texts())
    files = sorted(packed.iterdir())
    for file in files:
        run.phase(Phase("deliver", title=f"giving the result to {', '.join(sites) or 'nobody: no site asks for it'}"))
        content = torch.from_numpy(np.fromfile(file, np.uint8))
        message = Message(DeliverResult(file=file.name, last=file == files[-1]), {CONTENT: content})
        for _ in collect(engine, run, dict.fromkeys(sites, message)):
            pass
    shutil.rmtree(run.path / "work", ignore_errors=True)


def _offer(run: Path | None, out: Path, state: dict[str, str]) -> None:
    """Links what the operator may fetch into FLARE's folder of the job, which FLARE keeps and gives out."""
    out.mkdir(parents=True, exist_ok=True)
    (out / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    if run is None:
        return
    for name in [*FETCHED, *(file.name for file in run.glob("plan-*.json"))]:
        for file in [run / name] if (run / name).is_file() else sorted((run / name).rglob("*")):
            if file.is_file():
                target = out / file.relative_to(run)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, target)
