"""Options that several commands share, and the allowed values of options."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer


def _no_bars_of_downloads(quiet: bool) -> bool:
    if quiet:  # said before huggingface_hub is imported, which does not follow TQDM_DISABLE on a terminal
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.", callback=_no_bars_of_downloads)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job: stages.0.sparsity=0.6")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Workers = Annotated[int, typer.Option(min=0, help="Worker processes; 0: the clients' work is done in this process.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of each process; default: one per core.")]


class Tracker(StrEnum):
    """Programs to which ``run`` can log its metrics."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"


class Measure(StrEnum):
    """What ``evaluate`` measures on texts."""

    perplexity = "perplexity"
    accuracy = "accuracy"
    generation = "generation"


class By(StrEnum):
    """How ``adopt`` finds weights over the members of a pool."""

    gate = "gate"
    losses = "losses"


class Deal(StrEnum):
    """How ``split`` distributes records."""

    iid = "iid"
    dirichlet = "dirichlet"
    field = "field"
    size = "size"
