"""The Python API: :func:`run`, :func:`plan` and :func:`evaluate`. The command line calls these functions.

>>> from fedgrove import api                                                 # doctest: +SKIP
>>> result = api.run("job.toml", out="runs/first")                           # doctest: +SKIP
>>> result.sparsity, result.perplexity["federated"]                          # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file

from fedgrove import tracking
from fedgrove.data.tokens import encode_prompt
from fedgrove.data.windows import evaluation_windows
from fedgrove.errors import FedgroveError
from fedgrove.evaluation.examiner import Examiner, examine_directory, plain
from fedgrove.evaluation.metrics import read_pairs
from fedgrove.events import Phase, Several, announce
from fedgrove.export import find_named
from fedgrove.job.load import load, parse
from fedgrove.job.tables import Job
from fedgrove.progress import display
from fedgrove.report.reader import read
from fedgrove.report.summary import Summary
from fedgrove.rounds.federation import Federation
from fedgrove.run import local_engine, make_plans, open_model, run_job
from fedgrove.runfolder import RunFolder, planning_folder

AnyJob = Job | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        path: the run folder, which contains ``model`` and ``report.html``.
        summary: the content of its files.
    """

    path: Path
    summary: Summary

    @property
    def model(self) -> Path:
        """The resulting model: a plain Hugging Face directory."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the pruned weights."""
        return self.summary.sparsity

    @property
    def perplexity(self) -> dict[str, Any]:
        """Perplexity by model ("dense", "alone", "federated", "centralized") and text; "alone" also by client."""
        return self.summary.perplexities()


def run(
    job: AnyJob,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    workers: int = 0,
    quiet: bool = False,
    track: Sequence[str] = (),
) -> Result:
    """Runs a job on this machine, as ``fedgrove run`` does.

    Args:
        job: a path, or the content of a job file as a dict; paths in a dict are relative to the current folder.
        out: the run folder; default: ``runs/NAME``.
        resume: continue an interrupted run.
        workers: the number of worker processes; 0: the clients' work is done in this process. In a script, workers need
            the usual ``if __name__ == "__main__":``.
        quiet: show no progress on standard error.
        track: "tensorboard" and/or "mlflow": also log metrics there as they are measured; see :mod:`fedgrove.tracking`.

    Raises:
        FedgroveError: an error that the user can fix, in one line.
    """
    wanted = as_job(job)
    hush()
    place = Path(out) if out is not None else Path("runs") / wanted.name
    with display(quiet, delay=0) as listener, ExitStack() as trackers:
        folder = RunFolder(place, wanted, resume=resume, listener=listener)
        try:
            if track:
                tracked = [trackers.enter_context(tracking.track(kind, wanted.name, folder.path)) for kind in track]
                folder.listener = Several([listener, *tracked])
            engine = local_engine(wanted, folder.path / "clients", workers)
            try:
                run_job(wanted, engine, folder, engine.device)
            finally:
                engine.close()
        finally:
            folder.close()
    return Result(folder.path, read(folder.path))


def plan(job: AnyJob, *, quiet: bool = False) -> list[Any]:
    """Plans each stage: what each client would do and send, and the memory and time that it needs. Runs nothing.

    The plans are frozen objects (:class:`fedgrove.stages.prune.plan.Plan`, :class:`fedgrove.stages.tune.plan.TunePlan`, …);
    ``model_dump()`` converts one to a dict.

    Raises:
        FedgroveError: an error that the user can fix, in one line.
    """
    wanted = as_job(job)
    hush()
    with (
        display(quiet) as listener,
        planning_folder(wanted, listener) as asked,
        closing(local_engine(wanted, asked.path / "clients")) as engine,
    ):
        return make_plans(wanted, open_model(wanted.model), Federation(engine, asked))


def evaluate(
    model: str | Path,
    data: Sequence[str | Path] | str | Path = (),
    *,
    measure: Literal["perplexity", "accuracy", "generation"] = "perplexity",
    text: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    labels: Sequence[str] = (),
    length: int = 512,
    records: int | None = None,
    tokens: int = 64,
    speed: bool = False,
    tasks: Sequence[str] = (),
    tasks_from: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, float]]:
    """Measures a model, as ``fedgrove evaluate`` does.

    Args:
        model: a run folder, a model directory or a hub id.
        data: the held-out texts, or one; see :mod:`fedgrove.data.sources`.
        measure: "perplexity" of ``text``: consecutive windows of ``length`` tokens that do not overlap. "accuracy": how often
            the most likely of the ``labels`` is the ``answer`` to the ``prompt``. "generation": ROUGE and BLEU of what the
            model generates after the ``prompt``, with the ``answer`` as reference.
        text, prompt, answer: templates that turn a record into these.
        labels: all possible answers; default: all answers that occur.
        length: tokens of a window, or of a prompt with its label.
        records: the maximum number of records of each text whose answers are measured, and of each task.
        tokens: the maximum number of generated tokens per record.
        speed: also measure tokens per second, bytes on disk and peak memory, in plain transformers in a separate
            process.
        tasks: names of tasks of lm-evaluation-harness.
        tasks_from: a folder with YAML files of more tasks.
        quiet: show no progress on standard error.

    Returns:
        By text (or task, or "speed"), named numbers. ``NAME.low`` and ``NAME.high`` are the ends of a 95 % interval.

    Raises:
        FedgroveError: an error that the user can fix, in one line.
    """
    hush()
    sources = [data] if isinstance(data, str | Path) else list(data)
    if not (sources or speed or tasks):
        raise FedgroveError("nothing to measure: give --data, --speed or --task")
    if measure != "perplexity" and (prompt is None or answer is None):
        raise FedgroveError(f"--measure {measure}: give --prompt '{{question}} ' --answer '{{answer}}'")
    options = {"--text": text, "--prompt": prompt, "--answer": answer, "--label": labels or None}
    allowed = {
        "perplexity": {"--text"},
        "accuracy": {"--prompt", "--answer", "--label"},
        "generation": {"--prompt", "--answer"},
    }
    for option, value in options.items():
        if value is not None and option not in allowed[measure]:
            raise FedgroveError(f"{option}: --measure {measure} does not use it", "leave it out, or choose another measure")
    metrics: dict[str, dict[str, float]] = {}
    folder = find_named(model)
    with display(quiet, delay=0) as listener:
        if sources:
            examiner = Examiner.of(folder, length)
            for number, source in enumerate(map(Path, sources)):
                phase = Phase("evaluate", str(source), done=number, total=len(sources))
                on_progress = announce(listener, phase)
                if measure == "perplexity":
                    windows = evaluation_windows(source, text, examiner.tokenizer, length)
                    measured = plain(examiner.perplexity(windows, on_progress))
                    counted = sum(ids.numel() - 1 for ids in windows)
                    metrics[str(source)] = {**measured, "tokens": counted, "windows": len(windows)}
                else:
                    pairs = read_pairs(source, prompt or "", answer or "", examiner.tokenizer, records)
                    given = plain(examiner.answers(measure, pairs, on_progress, labels=labels, length=length, tokens=tokens))
                    metrics[str(source)] = {**given, "records": len(pairs)}
        where = Path(tasks_from) if tasks_from is not None else None
        metrics |= examine_directory(folder, listener, speed=speed, tasks=tasks, tasks_from=where, limit=records)
    return metrics


def as_job(job: AnyJob) -> Job:
    """A job from a path or from the content of a job file; a job is returned unchanged.

    Raises:
        FedgroveError: a key is wrong; names it.
    """
    if isinstance(job, Job):
        return job
    if isinstance(job, Mapping):
        return parse(dict(job), Path.cwd(), "job")
    return load(Path(job))


def hush() -> None:
    """Turns off the warnings and progress bars of transformers, which would disturb our own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def with_prompt(model: Any, tokenizer: Any, folder: str | Path, text: str) -> dict[str, torch.Tensor]:
    """The inputs of a text with a soft prompt after it, for ``model(**inputs)`` and ``model.generate(**inputs)``.

    Args:
        model: the base model, loaded by plain transformers.
        tokenizer: the model's.
        folder: ``RUN/prompt`` of a stage "prompt" with ``place = "end"``.
        text: as the key ``prompt`` of the job writes it.

    Returns:
        ``inputs_embeds`` (1, tokens, width) and ``attention_mask`` (1, tokens).
    """
    soft = load_file(Path(folder) / "prompt.safetensors")["prompt"]
    ids = torch.tensor([encode_prompt(text, tokenizer)], device=model.device)
    embeddings = cast(torch.Tensor, model.get_input_embeddings()(ids))
    together = torch.cat([embeddings, soft.to(embeddings)[None]], 1)
    return {"inputs_embeds": together, "attention_mask": torch.ones_like(together[:, :, 0], dtype=torch.int64)}
