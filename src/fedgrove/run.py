"""READ THIS FIRST: a whole run, top to bottom.

A job comes in, each stage is planned and carried out by the clients, the model is measured before the first and after
every stage, and a plain Hugging Face model comes out. Everything that is decided, measured or sent is written to the run
folder, and what is there already is not done again: that is how a killed run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fedgrove import heap, plugins
from fedgrove.centralized import centralized_job, centralized_site
from fedgrove.client.handlers import LocalClient
from fedgrove.engines.base import Engine
from fedgrove.engines.local import LocalEngine
from fedgrove.exports.hf import USE
from fedgrove.job import Job, Model, StructuredStage, PruneStage, TuneStage
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint, find_model
from fedgrove.stages.structured.plan import StructuredPlan, make_structured_plan
from fedgrove.stages.prune.plan import Capabilities, Plan, calibration, make_plan
from fedgrove.privacy.secure import Credentials, make_credentials
from fedgrove.progress import Within
from fedgrove.report.model_card import card
from fedgrove.report.page import write_report
from fedgrove.report.summary import CENTRALIZED
from fedgrove.rounds.collect import Message, ask
from fedgrove.rounds.wire import Info, WireError
from fedgrove.runfolder import Run, read_lines
from fedgrove.evaluation.evaluate import evaluate, evaluate_directory, evaluate_speed
from fedgrove.stages.structured.stage import narrow
from fedgrove.stages.prune.stage import prune
from fedgrove.evaluation.samples import write_samples
from fedgrove.stages.tune.stage import pruned_linears, tune
from fedgrove.stages.tune.plan import TunePlan, even, make_tune_plan, measure

STAGES: dict[str, Callable[[Checkpoint, Any, Engine, Run], Checkpoint]] = {"structured": narrow, "prune": prune, "tune": tune}


def main(job: Job, engine: Engine, run: Run) -> None:
    """Runs a job.

    Args:
        job: what is wanted.
        engine: reaches the clients.
        run: the run folder; an interrupted run continues.

    Raises:
        FedgroveError: a fault that the user can mend.
    """
    if not run.has_model():
        make_model(job, engine, run)
    write_samples(run)
    evaluate_directory(run.path / "model", len(job.stages) - 1, run)
    if job.evaluate.speed:
        evaluate_speed(open_model(job.model).path, run.path / "model", run)
    if job.evaluate.centralized:
        centralize(job, run)
    write_report(run.path)
    run.finish()


def make_model(job: Job, engine: Engine, run: Run) -> None:
    """Everything up to the finished model in the run folder."""
    model = open_model(job.model)
    plans = make_plans(job, model, engine, run)  # every client's text is tried before anything is computed
    evaluate(model, None, engine, run)
    evaluate_directory(model.path, None, run)
    for stage, plan in zip(job.stages, plans, strict=True):
        run.write_json(f"plan-{plan.stage}-{plan.kind}.json", plan.model_dump(mode="json"))
        model = STAGES[stage.kind](model, plan, engine, run)
        evaluate(model, plan, engine, run)
    run.step("writing the model")
    heap.release_freed_memory()  # what the last stage worked with
    base = model.path / "README.md"
    base_card = base.read_text(encoding="utf-8") if base.is_file() else None
    model.write(run.path / "model", {"README.md": card(run.path, base_card, USE.replace("FOLDER", "model"))})


def open_model(model: Model) -> Checkpoint:
    """The model of a job, found here or on the hub; nothing of it is read yet."""
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    return Checkpoint(find_model(model.path, model.revision), dtype)


def make_plans(job: Job, model: Checkpoint, engine: Engine, run: Run) -> list[Plan | StructuredPlan | TunePlan]:
    """Asks the clients what they have, and plans every stage."""
    calibrations = {
        client.name: [
            calibration(job.seed, index, client.samples or stage.samples, stage.length)
            for index, stage in enumerate(job.stages)
            if isinstance(stage, PruneStage | StructuredStage)
        ]
        for client in job.clients
    }
    lengths = [stage.length for stage in job.stages if isinstance(stage, TuneStage)]
    messages: dict[str, Message] = {
        name: ({}, {"calibrations": calibrations[name], "lengths": lengths}) for name in engine.sites()
    }
    run.step("asking the clients what they have")
    answers = ask(engine, run, "card", messages, stage=0, round_=0, check=_check_card)
    cards = {client: Capabilities(**info) for client, _, info in answers}
    decoder = Decoder(model)
    plans: list[Plan | StructuredPlan | TunePlan] = []
    pruned = False
    for index, stage in enumerate(job.stages):
        if isinstance(stage, PruneStage):
            needs, secure = plugins.load("stages.prune.pruners", stage.pruner).NEEDS, job.privacy.secure_aggregation
            plans.append(make_plan(index, stage, decoder, cards, needs, job.seed, secure))
            pruned = True
        elif isinstance(stage, StructuredStage):
            narrower = make_structured_plan(index, stage, decoder, cards, job.privacy.secure_aggregation)
            plans.append(narrower)
            decoder = Decoder(model.over(width=narrower.after))  # as later stages will find it; its weights are not there yet
        else:
            sizes = measure(decoder, stage.length, pruned or bool(pruned_linears(Decoder(model))))
            secure = job.privacy.secure_aggregation
            plan = make_tune_plan(index, stage, sizes, cards, even(sizes), together=job.together, secure=secure)
            plans.append(plan.model_copy(update={"notes": plan.notes + beside(job, index)}))
    return plans


def beside(job: Job, index: int) -> list[str]:
    """What a stage's promise of privacy does not cover: other stages that use the same text."""
    if getattr(job.stages[index], "epsilon", None) is None:
        return []
    notes = []
    for other, stage in enumerate(job.stages):
        if other == index or (isinstance(stage, PruneStage) and stage.pruner == "magnitude"):
            continue
        epsilon = getattr(stage, "epsilon", None)
        if epsilon is None:
            notes.append(
                f"Stage {other} uses the same text without noise, and the result holds what it learnt: no privacy is promised "
                "for the run as a whole. Give it an epsilon too, or run stage "
                f"{index} in a job of its own on other text."
            )
        else:
            notes.append(f"Stage {other} spends epsilon = {epsilon:g} of the same text besides; the sums of both count.")
    return notes


def centralize(job: Job, run: Run) -> None:
    """Runs the job as one owner of everybody's text, in a run folder within this one. In a simulation only."""
    wanted, folder = centralized_job(job), run.path / CENTRALIZED
    inner = Run(folder, wanted, resume=True, watch=Within(run.watch, CENTRALIZED))
    try:
        for name in ("metrics.jsonl", "examples.jsonl"):  # the model as it came is the same, and was measured
            if not (folder / name).is_file():
                lines = [line for line in read_lines(run.path / name) if line["stage"] is None]
                inner.write_text(name, "".join(json.dumps(line) + "\n" for line in lines))
        model = open_model(job.model)
        main(wanted, LocalEngine([centralized_site(local_sites(job, model, folder / "clients"), folder / "clients")]), inner)
    finally:
        inner.close()


def _check_card(client: str, tensors: dict[str, Tensor], info: Info) -> None:
    try:
        Capabilities(**info)
    except ValidationError as fault:
        raise WireError(f"its card is not understood ({fault.errors()[0]['loc'][0]})") from fault


def local_engine(job: Job, folder: Path, workers: int = 0, devices: Sequence[str] | None = None) -> LocalEngine:
    """The embedded default: the job's clients on this machine, each with a folder of its own for its working files."""
    return LocalEngine(local_sites(job, open_model(job.model), folder), workers, devices)


def local_sites(job: Job, model: Checkpoint, folder: Path) -> list[LocalClient]:
    """The job's clients, simulated."""
    credentials: dict[str, Credentials] = {}
    if job.privacy.secure_aggregation:
        credentials = make_credentials((client.name for client in job.clients), job.privacy.min_group)
    return [
        LocalClient(
            name=client.name,
            folder=folder / client.name,
            model=model.path,
            dtype=model.dtype,
            data=client.data,
            text=client.text,
            card=client.model_dump(include=set(Capabilities.model_fields), mode="json"),
            credentials=credentials.get(client.name),
            prompt=client.prompt,
            answer=client.answer,
        )
        for client in job.clients
    ]
