"""READ THIS FIRST: a whole run, top to bottom.

A run takes a job, plans each stage, runs the stages with the clients, measures the model before the first stage and
after every stage, and writes a plain Hugging Face model. All plans, measurements and message sizes are written to the
run folder, and what is already there is not done again: this is how a killed run is continued.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fedgrove import heap
from fedgrove.centralized import centralized_client, centralized_job
from fedgrove.client.local_client import LocalClient
from fedgrove.engines.base import Engine
from fedgrove.engines.local import LocalEngine
from fedgrove.errors import FedgroveError
from fedgrove.evaluation.evaluate import evaluate, evaluate_alone, evaluate_directory, evaluate_speed
from fedgrove.evaluation.samples import write_samples
from fedgrove.events import Phase, Within
from fedgrove.exports import hf, shared
from fedgrove.files import read_lines
from fedgrove.job.tables import Job, Model
from fedgrove.models.blocks import Decoder
from fedgrove.models.files import find_model
from fedgrove.models.preconditions import check_finite, check_for_others, check_length, check_parameters, check_vocabulary
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.secagg.keys import Credentials, make_credentials
from fedgrove.report.model_card import card
from fedgrove.report.page import write_report
from fedgrove.report.summary import CENTRALIZED
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.exchanges.capabilities import DescribeYourself, Windows
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Message
from fedgrove.runfolder import RunFolder
from fedgrove.stages.base import Plan, calibration_seed, stage_of


def run_job(job: Job, engine: Engine, run: RunFolder, device: str = "cpu") -> None:
    """Runs a job.

    Args:
        job: the job.
        engine: reaches the clients.
        run: the run folder; an interrupted run continues.
        device: the server's torch device.

    Raises:
        FedgroveError: an error that the user can fix.
    """
    if not run.has_model():
        make_model(job, Federation(engine, run, device))
    write_samples(run)
    evaluate_directory(run.path / "model", len(job.stages) - 1, run)
    if job.evaluate.speed:
        evaluate_speed(open_model(job.model).path, run.path / "model", run)
    if job.evaluate.centralized:
        run_centralized(job, run, device)
    write_report(run.path)
    run.finish()


def make_model(job: Job, federation: Federation) -> None:
    """Runs all stages and writes the finished model to the run folder."""
    run = federation.run
    model = open_model(job.model)
    check_finite(model)
    plans = make_plans(job, model, federation)  # first, to find errors in texts before anything is computed
    evaluate(model, None, run, federation.device)
    evaluate_directory(model.path, None, run)
    for config, plan in zip(job.stages, plans, strict=True):
        run.write_json(f"plan-{plan.stage}-{plan.kind}.json", plan.model_dump(mode="json"))  # written before the first round
        before = model
        model = stage_of(config.kind).run(model, plan, config, federation).model
        evaluate(model, plan.stage, run, federation.device)
        evaluate_alone(before, plan, config, federation)
    run.phase(Phase("write", title="writing the model"))
    heap.release_freed_memory()  # of the last stage
    base = model.path / "README.md"
    base_card = base.read_text(encoding="utf-8", errors="replace") if base.is_file() else None
    is_whole = all(map(model.has_copy, model.shares))
    use = (hf if is_whole else shared).USE.replace("FOLDER", "model")
    model.write(run.path / "model", {"README.md": card(run.path, base_card, use)})


def check_model(job: Job, decoder: Decoder) -> tuple[str, ...]:
    """Whether a model has all parameters, and rows and positions enough for the job's text; reads no weights.

    Returns:
        Notes.

    Raises:
        FedgroveError: it has not; names the tensor, the file or the key.
    """
    notes = check_parameters(decoder)
    if job.evaluate.speed or job.evaluate.tasks or job.evaluate.prompts:
        check_for_others(decoder.checkpoint)
    check_vocabulary(decoder.checkpoint.tokenizer(), decoder)
    lengths = {"evaluate.length": job.evaluate.length} if job.evaluate.data else {}
    for index, stage in enumerate(job.stages):
        windows = stage.calibration_windows()
        length = windows[1] if windows is not None else stage.training_length()
        if length is not None:
            lengths[f"stages.{index}.length"] = length
    more = (check_length(decoder, length, key) for key, length in lengths.items())
    return *notes, *(note for note in more if note is not None)


def make_plans(job: Job, model: Checkpoint, federation: Federation) -> list[Plan]:
    """Checks the model, requests the clients' capabilities, and plans every stage.

    A client whose capabilities make a plan impossible is left out, as long as ``rounds.quorum`` clients remain.

    Raises:
        FedgroveError: a stage cannot be done like this; names the key or the client.
    """
    decoder = Decoder(model)
    notes_on_model = check_model(job, decoder)
    capabilities = ask_capabilities(job, federation)
    needed = min(job.rounds.quorum or len(federation.clients()), len(federation.clients()))
    left_out: dict[str, str] = {}
    while True:
        try:
            plans = plan_stages(job, decoder, capabilities, notes_on_model)
        except FedgroveError as error:
            if error.client is None or error.client not in capabilities or len(capabilities) <= needed:
                raise
            federation.run.message(f"{error}: it is left out")
            left_out[error.client] = str(error)
            del capabilities[error.client]
        else:
            return [plan.model_copy(update={"left_out": {**plan.left_out, **left_out}}) for plan in plans]


def plan_stages(
    job: Job, decoder: Decoder, capabilities: Mapping[str, Capabilities], notes_on_model: tuple[str, ...]
) -> list[Plan]:
    """Plans every stage for the model's shapes at that stage; ``decoder`` is the model before the first one.

    Raises:
        FedgroveError: a stage cannot be done like this; names the key or the client.
    """
    plans: list[Plan] = []
    model = decoder.checkpoint
    for index, config in enumerate(job.stages):
        if model is not decoder.checkpoint:
            decoder = Decoder(model)
        own = {client: capabilities[client] for client in capabilities if config.takes_part(client)}
        if not own:
            raise FedgroveError(f"stages.{index}.clients: none of them is left")
        plan = stage_of(config.kind).plan(index, config, decoder, own, job.of_stage(index))
        notes = (*plan.notes, *notes_on_other_stages(job, index), *(notes_on_model if index == 0 else ()))
        plans.append(plan.model_copy(update={"notes": notes}))
        model = plan.reshaped(model)
    return plans


def ask_capabilities(job: Job, federation: Federation) -> dict[str, Capabilities]:
    """The capabilities of each client, by name. Each client first checks that its text suffices for every stage."""
    own_samples = {client.name: client.samples for client in job.clients}
    messages = {}
    for client in federation.clients():
        calibrations, lengths = [], []
        for index, config in enumerate(job.stages):
            if not config.takes_part(client):
                continue
            lengths.append(config.training_length())
            windows = config.calibration_windows()
            if windows is not None:
                samples = own_samples.get(client) or windows[0]
                seed = calibration_seed(job.seed, index)
                calibrations.append(Windows(samples=samples, length=windows[1], seed=seed))
        request = DescribeYourself(calibrations=tuple(calibrations), lengths=tuple(n for n in lengths if n is not None))
        messages[client] = Message(request)
    federation.run.phase(Phase("plan", title="requesting the clients' capabilities"))
    capabilities = {}
    for client, _, reply in federation.collect(messages):
        assert isinstance(reply, Capabilities)
        capabilities[client] = reply
    return capabilities


def notes_on_other_stages(job: Job, index: int) -> list[str]:
    """Notes that a stage's privacy guarantee does not cover other stages, which use the same text."""
    if job.stages[index].privacy_budget() is None:
        return []
    notes = []
    for other, config in enumerate(job.stages):
        if other == index or not config.reads_text():
            continue
        budget = config.privacy_budget()
        if budget is None:
            notes.append(
                f"Stage {other} uses the same text without noise, and the result depends on it: the run as a whole has no "
                "privacy guarantee. Give that stage an epsilon, too, or run stage "
                f"{index} in a separate job on other text."
            )
        else:
            notes.append(f"Stage {other} also spends epsilon = {budget[0]:g} on the same text; both epsilons add up.")
    return notes


def run_centralized(job: Job, run: RunFolder, device: str) -> None:
    """Runs the job with one client that has everybody's text, in a run folder within this one. In a simulation only."""
    wanted, folder = centralized_job(job), run.path / CENTRALIZED
    inner = RunFolder(folder, wanted, resume=True, listener=Within(run.listener, CENTRALIZED))
    try:
        for name in ("metrics.jsonl", "examples.jsonl"):  # the base model is the same and was measured already
            if not (folder / name).is_file():
                lines = [line for line in read_lines(run.path / name) if line["stage"] is None]
                inner.write_text(name, "".join(json.dumps(line) + "\n" for line in lines))
        clients = local_clients(job, open_model(job.model), folder / "clients")
        run_job(wanted, LocalEngine([centralized_client(clients, folder / "clients")]), inner, device)
    finally:
        inner.close()


def open_model(model: Model) -> Checkpoint:
    """The model of a job, a local directory or from the hub; reads no weights."""
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    return Checkpoint(find_model(model.path, model.revision), dtype, shares=model.shares)


def local_engine(job: Job, folder: Path, workers: int = 0, devices: Sequence[str] | None = None) -> LocalEngine:
    """The engine of a simulation: the job's clients on this machine, each with its own folder for working files."""
    return LocalEngine(local_clients(job, open_model(job.model), folder), workers, devices)


def local_clients(job: Job, model: Checkpoint, folder: Path) -> list[LocalClient]:
    """The job's clients, simulated on this machine."""
    credentials: dict[str, Credentials] = {}
    if job.privacy.secure_aggregation:
        credentials = make_credentials((client.name for client in job.clients), job.privacy.min_group)
    at_endpoint = {"endpoint": job.model.endpoint.logprobs} if job.model.endpoint else {}
    return [
        LocalClient(
            name=client.name,
            folder=folder / client.name,
            model=model.path,
            dtype=model.dtype,
            data=client.data,
            text=client.text,
            capabilities={
                **client.model_dump(include=set(Capabilities.model_fields), mode="json"),
                "speed": client.claimed_speed or client.speed,
                **at_endpoint,
            },
            credentials=credentials.get(client.name),
            prompt=client.prompt,
            answer=client.answer,
            shares=job.model.shares,
            endpoint=job.model.endpoint,
        )
        for client in job.clients
    ]
