"""Options that several commands share, and the allowed values of options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
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


class Deal(StrEnum):
    """How ``split`` distributes records."""

    iid = "iid"
    dirichlet = "dirichlet"
    field = "field"
    size = "size"
