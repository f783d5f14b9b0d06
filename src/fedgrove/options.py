"""The options that several commands share, and the values that an option may take."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job: stages.0.sparsity=0.6")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Workers = Annotated[int, typer.Option(min=0, help="Worker processes; 0: the clients' work is done in this process.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of each process; default: one a core.")]


class Tracker(StrEnum):
    """Where ``run`` hands its metrics on to."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"


class Measure(StrEnum):
    """What ``evaluate`` measures on texts."""

    perplexity = "perplexity"
    accuracy = "accuracy"
    generation = "generation"


class Deal(StrEnum):
    """How ``split`` deals."""

    iid = "iid"
    dirichlet = "dirichlet"
    field = "field"
    size = "size"
