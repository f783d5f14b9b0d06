"""Evaluation between stages: measures the model, and the model that each client would have without the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.examiner import Examiner, examine_directory, plain
from fedgrove.evaluation.metrics import read_pairs
from fedgrove.evaluation.rounds import heldout_windows
from fedgrove.events import Phase
from fedgrove.job.stage_config import StageConfig
from fedgrove.models.perplexity import perplexity_of
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.federation import Federation
from fedgrove.runfolder import RunFolder
from fedgrove.stages.base import Plan, stage_of


def evaluate(model: Checkpoint, stage: int | None, run: RunFolder, device: str = "cpu") -> None:
    """Measures a model on the job's held-out texts and writes ``perplexity/<text>``, ``accuracy/<text>``, … to the metrics.

    ``perplexity.low/<text>`` and ``.high`` are the ends of a 95 % interval. What is already in ``metrics.jsonl`` is not
    measured again.

    Args:
        model: the model.
        stage: index of the stage that made the model; None: the base model.
        run: the run folder.
        device: the torch device, such as "cuda:0".
    """
    wanted = run.job.evaluate
    if not wanted.data:
        return
    done = {(line["stage"], line["client"], line["name"]) for line in run.metrics() if line["round"] is None}
    windows = heldout_windows(model, run)
    examiner = Examiner(model, device, wanted.compute_dtype)
    for number, text in enumerate(wanted.data):
        if any(text.measure in one.measures() for one in run.job.stages):
            continue  # the stage measures what it makes
        first = "rougeL" if text.measure == "generation" else text.measure
        if (stage, None, f"{first}/{text.name}") in done:
            continue
        which = "the dense model" if stage is None else "the federated model" if len(run.job.clients) > 1 else "the new model"
        on_progress = run.phase(Phase("evaluate", which, stage=stage, text=text.name, done=number, total=len(wanted.data)))
        if text.measure == "perplexity":
            by_metric = examiner.perplexity(windows[text.name], on_progress)
            if stage is None and not math.isfinite(by_metric["perplexity"].value):
                raise FedgroveError(
                    f"model: its perplexity on {text.name} is {by_metric['perplexity'].value}, before any stage",
                    "copy the model again; if its weights are right, try another text",
                )
        else:
            pairs = read_pairs(text.path, text.prompt or "", text.answer or "", examiner.tokenizer, wanted.records)
            by_metric = examiner.answers(text.measure, pairs, on_progress, text.labels, wanted.length, wanted.tokens)
        for name, measured in by_metric.items():
            if measured.parts:
                run.keep(stage, None, f"{name}/{text.name}", measured.parts)
        _log(plain(by_metric), text.name, stage, done, run, last=first)


def evaluate_alone(model: Checkpoint, plan: Plan, config: StageConfig, federation: Federation) -> None:
    """Measures, after the first stage, the model that each client would have without the others (``evaluate.alone``).

    Args:
        model: the model before the stage.
        plan: the plan of the stage. Nothing is measured for a kind of stage that cannot compute such a model.
        config: the table of the stage.
        federation: reaches the clients.
    """
    run = federation.run
    wanted = run.job.evaluate
    if plan.stage > 0 or not wanted.measures_alone:
        return
    done = {(line["stage"], line["client"], line["name"]) for line in run.metrics() if line["round"] is None}
    windows = heldout_windows(model, run)

    def missing(client: str) -> list[str]:
        return [name for name in windows if (plan.stage, client, f"perplexity/{name}") not in done]

    left = [client for client in plan.clients if missing(client)]
    if not left:
        return
    for client, losses in stage_of(plan.kind).alone(model, plan, config, left, windows, federation):
        for name in missing(client):
            _log_alone(losses[name], plan.stage, client, name, run)


def _log_alone(each: Sequence[tuple[float, float]], stage: int | None, client: str, text: str, run: RunFolder) -> None:
    run.keep(stage, client, f"perplexity/{text}", each)
    run.log(stage, None, client, f"perplexity/{text}", perplexity_of(sum(loss for loss, _ in each), sum(n for _, n in each)))


def evaluate_speed(before: Path, after: Path, run: RunFolder) -> None:
    """Measures ``prefill/speed``, ``decode/speed``, ``memory/speed`` and ``disk/speed`` of base model and result.

    Both are measured at the end of the run, one after the other, because the load of the machine changes during a run.
    """
    for model, stage in ((before, None), (after, len(run.job.stages) - 1)):
        evaluate_directory(model, stage, run, speed=True)


def evaluate_directory(model: Path, stage: int | None, run: RunFolder, speed: bool = False) -> None:
    """Measures a model directory in plain transformers: ``acc/<task>`` and so on.

    Args:
        stage: index of the stage that made it; None: the base model.
        speed: also measure its speed, memory and bytes.
    """
    wanted = run.job.evaluate
    done = {(line["stage"], line["client"], line["name"]) for line in run.metrics() if line["round"] is None}
    measured_names = {name.partition("/")[2] for at, _, name in done if at == stage}
    tasks = [task for task in wanted.tasks if task not in measured_names]
    speed = speed and (stage, None, "disk/speed") not in done
    dtype = run.job.model.dtype
    for name, value in examine_directory(
        model, run.listener, speed=speed, tasks=tasks, tasks_from=wanted.tasks_from, limit=wanted.records, dtype=dtype
    ).items():
        _log(value, name, stage, done, run, last="disk")


def _log(found: Mapping[str, float], text: str, stage: int | None, done: Set[Any], run: RunFolder, last: str) -> None:
    """Writes named numbers to the metrics, ``last`` at the end: if it was written, all of them were."""
    for name in sorted(found, key=lambda name: name == last):
        if (stage, None, f"{name}/{text}") not in done:
            run.log(stage, None, None, f"{name}/{text}", found[name])
