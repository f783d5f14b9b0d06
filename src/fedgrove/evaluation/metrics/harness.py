"""Tasks of EleutherAI's lm-evaluation-harness: its built-in tasks, and those of local YAML files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedgrove.data.tokens import prefix_ids
from fedgrove.errors import FedgroveError, first_line
from fedgrove.evaluation.metrics import Measured
from fedgrove.models.pretrained import plain_folder, read_tokenizer

Z_95 = 1.96  # half the width of a 95 % interval, in standard errors


def harness(
    model: Path, tasks: Sequence[str], folder: Path | None = None, limit: int | None = None, dtype: str = "auto"
) -> dict[str, dict[str, Measured]]:
    """Evaluates a model directory on tasks.

    Args:
        tasks: names of tasks or groups.
        folder: with YAML files of more tasks, and their data.
        limit: the maximum number of records of each task; None: all.

    Returns:
        By task, by metric. The interval is ±1.96 times the harness' standard error, which it bootstraps for metrics without a
        formula; None if it reports no standard error.

    Raises:
        FedgroveError: the extra is not installed, or a task is unknown or cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise FedgroveError(f'tasks need lm-eval: pip install "fedgrove[lm-eval]" ({error.name} is missing)') from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(folder) if folder else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = f"neither lm-eval nor {folder} has it" if folder else "lm-eval has no such task; name a folder of your own"
        raise FedgroveError(f"task {unknown[0]!r}: {where}")
    with plain_folder(model) as path:
        lm = HFLM(
            pretrained=str(path),
            dtype=dtype,
            batch_size=1,
            device="cuda" if torch.cuda.is_available() else "cpu",
            add_bos_token=bool(prefix_ids(read_tokenizer(model))),  # releases of the harness differ in what they do by default
            trust_remote_code=False,
        )
        try:
            evaluated = lm_eval.simple_evaluate(
                model=lm, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, verbosity="ERROR"
            )
        except Exception as error:  # what the harness raises for a task's files changes with its releases
            raise FedgroveError(f"tasks {', '.join(tasks)}: {first_line(error)}") from error
    return {task: _measured(values) for task, values in evaluated["results"].items()}


def _measured(values: dict[str, Any]) -> dict[str, Measured]:
    """{"acc,none": 0.5, "acc_stderr,none": 0.1} -> {"acc": 0.5 ± 0.196}."""
    metrics = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric}.{kind}"
        if isinstance(error, int | float):
            metrics[name] = Measured(float(value), value - Z_95 * error, value + Z_95 * error)
        else:
            metrics[name] = Measured(float(value))
    return metrics
