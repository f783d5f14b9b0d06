"""The server's part of a run: opens the job, asks the sites to join, runs it, sends the result to sites that want
it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgrove import events
from fedgrove.deploy.flare.exchanges.done import EndRun
from fedgrove.deploy.flare.exchanges.join import Joined, JoinRun
from fedgrove.deploy.flare.exchanges.result import CONTENT, DeliverResult
from fedgrove.deploy.flare.files import JOB, SERVER, ServerFile, model_folder, read
from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.escape import printable
from fedgrove.events import Event, Listener, Phase
from fedgrove.export import Texts, export
from fedgrove.job.federated import FederatedJob
from fedgrove.job.load import load_federated
from fedgrove.models.digest import digests
from fedgrove.report.stage_reports import stage_files, stage_folders
from fedgrove.rounds import wire
from fedgrove.rounds.collect import collect
from fedgrove.rounds.request import Message
from fedgrove.run import open_model, run_job
from fedgrove.runfolder import RunFolder

HELD_OUT, FACTS, STATE, SAID = "texts", "federation.json", "state.json", "said.txt"
FETCHED = ("report.html", "metrics.jsonl", "examples.jsonl", "ledger.jsonl", "samples.json", SAID, "model")
_PATH = re.compile(r"(?<![\w.:/])/[^\s/:;,'\"()]+(?:/[^\s/:;,'\"()]+)*")  # an absolute path without spaces
Connect = Callable[[list[str], str, float], Engine]  # clients, name of the working folder, seconds to fetch a request


class Recorder(Listener):
    """Stores every event of a run as JSON, for operators who watch the run remotely; also writes messages to a file.

    Attributes:
        events: all events so far, as :func:`fedgrove.events.to_json` writes them.
        file: the file for messages; None until the run folder exists.
        capabilities: by site; empty until the sites have agreed.
        folders: folders of the server, whose paths messages leave out.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.file: Path | None = None
        self.capabilities: dict[str, Any] = {}
        self.folders: list[Path] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, events.Message):
            event = events.Message(without_paths(event.text, self.folders))
        self.events.append(events.to_json(event))
        if isinstance(event, events.Message) and self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(printable(event.text) + "\n")

    def message(self, text: str) -> None:
        """Records a message of the server itself."""
        self.on_event(events.Message(text))


def coordinate(kit: Path, config: Path, results: Path, resume: bool, connect: Connect, recorder: Recorder) -> str | None:
    """Runs a submitted job.

    Args:
        kit: the server's folder.
        config: the folder of the job's files as they were submitted.
        results: the folder from which the operator fetches the result.
        resume: continue the run of this name.
        connect: makes the engine.
        recorder: gets the events of the run.

    Returns:
        None if the run ended well, else one line that says why it did not.
    """
    state: dict[str, Any] = {"state": "ended"}
    folder = None
    recorder.folders = [kit, config]
    try:
        settings = read(kit / SERVER, ServerFile)
        recorder.folders += [(kit / model).parent for model in settings.models.values()]
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        job = open_job(kit, config, settings)
        folder = kit / "runs" / job.name
        run = RunFolder(
            folder,
            job,
            resume=resume,
            listener=recorder,
            shown=f"name = {job.name!r}",
            another="give the job another name",
            beside=(FACTS, SAID),
        )
        try:
            recorder.file = folder / SAID
            run_with_sites(job, settings, connect, run, recorder)
        finally:
            run.close()
    except FedgroveError as error:
        state = {"state": "failed", "line": without_paths(str(error), recorder.folders)}
    except Exception as error:
        state = {"state": "failed", "line": f"{type(error).__name__} at the server; the trace is in its log"}
        raise
    finally:
        recorder.message(state.get("line", "the run has ended"))
        state["messages"] = [event["text"] for event in recorder.events if event["event"] == "message"]
        _offer(folder, results / "run", state, config / JOB)
    return state.get("line")


def without_paths(text: str, folders: Sequence[Path]) -> str:
    """A message for people at other machines: of each path only the last part, or the part within one of ``folders``."""
    known = {str(path) for folder in folders for path in (folder, folder.resolve()) if path != Path("/")}
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(f"{path}/", "").replace(path, Path(path).name)
    return _PATH.sub(lambda found: Path(found[0]).name, text)


def open_job(kit: Path, config: Path, settings: ServerFile) -> FederatedJob:
    """The submitted job with the server's copy of the model. No submitted path is opened.

    Raises:
        FedgroveError: the job is not valid, a held-out text is a path at the server, the server has no model of that name,
            or does not allow a task.
    """
    submitted, texts = config / HELD_OUT, kit / HELD_OUT
    if submitted.is_dir():
        for file in sorted(submitted.iterdir()):  # to a fixed folder: --resume refuses a job whose paths differ
            if file.is_file() and file.name == text_name(file):  # another name could replace the text of another job
                texts.mkdir(exist_ok=True)
                shutil.copyfile(file, texts / file.name)
    job = load_federated(config / JOB, texts=texts)
    if any(text.path.parent != texts.resolve() for text in job.evaluate.data):
        raise FedgroveError("evaluate.data: a held-out text travels with the job; a path at the server is not read")
    for task in job.evaluate.tasks:
        if task not in settings.tasks:
            raise FedgroveError(
                f"evaluate.tasks: the server does not allow {task!r}",
                f"it allows {', '.join(settings.tasks) or 'none'}; whoever runs it can add to tasks in its server.toml",
            )
    copy = job.model.at(model_folder(settings.models, job.model.path, kit))
    return job.model_copy(update={"model": copy})


def run_with_sites(job: FederatedJob, settings: ServerFile, connect: Connect, run: RunFolder, recorder: Recorder) -> None:
    """Asks the sites to join, runs the job and delivers the result."""
    facts = run.path / FACTS
    if not facts.is_file():
        run.write_json(FACTS, {"run": f"{job.name[:40]}-{secrets.token_hex(8)}"})
    name = str(json.loads(facts.read_text(encoding="utf-8"))["run"])
    joined = join(job, connect([client.name for client in job.clients], name, settings.grace), run)
    recorder.capabilities = {site: reply.capabilities.model_dump(mode="json") for site, reply in joined.items()}
    engine = connect(list(joined), name, settings.grace)
    run_job(job, engine, run, settings.device)
    if job.result == "sites":
        deliver(engine, run, [site for site, reply in joined.items() if reply.result])
    end = wire.pack({}, {"request": EndRun().model_dump(mode="json")})
    for _ in engine.request(EndRun.KIND, dict.fromkeys(engine.clients(), end), run.job.rounds.timeout):
        pass  # a site that misses this keeps its working files until its owner deletes them


def join(job: FederatedJob, engine: Engine, run: RunFolder) -> dict[str, Joined]:
    """Asks the sites to take part in this job, on the model of that name; returns the replies of those that do.

    Raises:
        FedgroveError: fewer agree than the quorum; names the first that does not, and why.
    """
    run.phase(Phase("join", title="asking the sites whether they take part"))
    of_model = digests(open_model(job.model), run.path / "work" / "digests.json")
    message = Message(JoinRun(digests=of_model, clock=time.time()))
    joined = {}
    for site, _, reply in collect(engine, run, dict.fromkeys(engine.clients(), message)):
        assert isinstance(reply, Joined)
        joined[site] = reply
    return joined


def deliver(engine: Engine, run: RunFolder, sites: list[str]) -> None:
    """Sends the finished model, packed, and what stages wrote beside it to the sites that want it."""
    packed = run.path / "work" / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    export(run.path / "model", "packed", packed, Texts())
    beside = [(name, file) for name in stage_folders() for file in (run.path / name).glob("*") if file.is_file()]
    files = [*sorted(beside), *((None, file) for file in sorted(packed.iterdir()))]
    for folder, file in files:
        run.phase(Phase("deliver", title=f"sending the result to {', '.join(sites) or 'no site: none asks for it'}"))
        content = torch.from_numpy(np.fromfile(file, np.uint8))
        last = (folder, file) == files[-1]
        message = Message(DeliverResult(folder=folder, file=file.name, last=last), {CONTENT: content})
        for _ in collect(engine, run, dict.fromkeys(sites, message)):
            pass
    shutil.rmtree(run.path / "work", ignore_errors=True)


def text_name(file: Path) -> str:
    """The name under which a held-out text travels with a job: a hash of its content."""
    return f"{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}{file.suffix}"


def _offer(run: Path | None, out: Path, state: dict[str, Any], submitted: Path) -> None:
    """Hard-links the files that the operator may fetch into FLARE's folder of the job, which FLARE serves.

    The job is offered as it was submitted: the run folder's has paths of the server.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    if run is None:
        return
    shutil.copyfile(submitted, out / JOB)
    names = [*FETCHED, *stage_files(), *stage_folders(), *(file.name for file in run.glob("plan-*.json"))]
    offered = {file for name in names for file in (run / name, *(run / name).rglob("*")) if file.is_file()}
    for file in offered:
        target = out / file.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, target)
