"""What a kind of stage is: a folder, whose ``stage.py`` holds four functions.

    plan(index, config, decoder, capabilities, job) -> Plan
    run(model, plan, config, federation) -> Result
    alone(model, plan, config, clients, windows, federation) -> what each client would have had without the others
    typical_memory(decoder, length) -> what a client needs, for ``fedgrove doctor``

``config.py`` beside it holds the stage's table of the job file (see :mod:`fedgrove.job.stage_config`), ``exchanges/`` what its
clients
are asked (see :mod:`fedgrove.rounds.request`), and ``report.py`` what the report says of it. The folder's name is the stage's
kind: that is the registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedgrove import plugins
from fedgrove.job.stage_config import STAGES
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.models.width import Width
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Disclosure

Losses = dict[str, list[tuple[float, int]]]  # by text, of each window: −Σ log p and the number of predicted tokens


class Assignment(BaseModel):
    """One client's part in a stage.

    Attributes:
        memory: bytes needed at the peak, besides the program itself.
        upload: bytes, in all rounds.
        seconds: computing and sending, in all rounds.
    """

    model_config = ConfigDict(frozen=True)

    memory: int
    upload: int
    seconds: float


class Plan(BaseModel):
    """Who does what in a stage: plain data, decided and on disk before the first round.

    Attributes:
        stage: the stage's place in the job.
        kind: of the stage.
        clients: each client's part, by name.
        left_out: client -> why it takes no part, and what would do.
        discloses: names of :class:`~fedgrove.rounds.request.Disclosure`: what a client's responses reveal about its text.
        notes: what a person should know before it runs.
    """

    model_config = ConfigDict(frozen=True)

    stage: int
    kind: str
    clients: Mapping[str, Assignment]
    left_out: dict[str, str] = {}
    discloses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def width_after(self) -> Width | None:
        """The width of the model's blocks after the stage, where the stage changes it."""
        return None

    def uploads(self) -> int:
        """Bytes that all clients send in the whole stage."""
        return sum(assignment.upload for assignment in self.clients.values())


@dataclass(frozen=True)
class Result:
    """What a stage made.

    Attributes:
        model: the model with the stage's changes laid over it.
        adapters: folders of adapters beside the merged model, by name.
    """

    model: Checkpoint
    adapters: Mapping[str, Path] = field(default_factory=dict)


class Stage(Protocol):
    """The functions of a stage's ``stage.py``."""

    def plan(self, index: int, config: Any, decoder: Decoder, capabilities: Mapping[str, Capabilities], job: Job) -> Plan:
        """Decides who does what.

        Args:
            index: the stage's place in the job.
            config: the stage's table.
            decoder: the model as the stage will find it; its weights may not be there yet.
            capabilities: what the clients said, by name.

        Raises:
            FedgroveError: it cannot be done; names the key or the client, and says what would do.
        """
        ...

    def run(self, model: Checkpoint, plan: Any, config: Any, federation: Federation) -> Result:
        """Carries the stage out. What is in the run folder already is not done again."""
        ...

    def alone(
        self,
        model: Checkpoint,
        plan: Any,
        config: Any,
        clients: Sequence[str],
        windows: Mapping[str, list[Tensor]],
        federation: Federation,
    ) -> Iterator[tuple[str, Losses]]:
        """Measures what each of these clients would have had without the others, on held-out windows by text."""
        ...

    def typical_memory(self, decoder: Decoder, length: int) -> dict[str, float]:
        """Bytes that one client needs for the stage's usual settings, by what is done; for ``fedgrove doctor``."""
        ...


def stage_of(kind: str) -> Stage:
    """The stage of a kind."""
    return cast(Stage, plugins.load(f"{STAGES}.{kind}", "stage", Stage))


def names_of(disclosures: frozenset[Disclosure]) -> tuple[str, ...]:
    """For a plan: the names of disclosures, in the order of their definition."""
    return tuple(one.name for one in Disclosure if one in disclosures)


def calibration_seed(seed: int, stage: int) -> str:
    """Draws a stage's calibration windows; each client adds its name."""
    return f"{seed}/{stage}"
