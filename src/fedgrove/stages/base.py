"""The interface of a stage. Each kind of stage is a folder, and its ``stage.py`` contains four functions:

    plan(index, config, decoder, capabilities, job) -> Plan
    run(model, plan, config, federation) -> Result
    alone(model, plan, config, clients, windows, federation) -> the losses that each client would have without the others
    typical_memory(decoder, length) -> the memory that a client needs, for ``fedgrove doctor``

The folder also contains ``config.py``, the stage's table in the job file (see :mod:`fedgrove.job.stage_config`);
``exchanges/``, the requests to its clients (see :mod:`fedgrove.rounds.request`); and ``report.py``, the stage's part of the
report. The folder's name is the stage's kind; there is no other registry.
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
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Disclosure

Losses = dict[str, list[tuple[float, int]]]  # by text, for each window: −Σ log p in nats, number of predicted tokens


class Assignment(BaseModel):
    """One client's part in a stage.

    Attributes:
        memory: peak memory in bytes, without that of the program itself.
        upload: bytes sent in all rounds.
        seconds: estimated time for computing and sending in all rounds.
    """

    model_config = ConfigDict(frozen=True)

    memory: int
    upload: int
    seconds: float


class Plan(BaseModel):
    """Who does what in a stage: plain data, decided and written to disk before the first round.

    Attributes:
        stage: the stage's place in the job.
        kind: the stage's kind.
        clients: each client's part, by name.
        left_out: client -> why it does not take part, and how to change that.
        discloses: names of :class:`~fedgrove.rounds.request.Disclosure`: what a client's responses reveal about its text.
        notes: sentences that the user should read before the stage runs.
    """

    model_config = ConfigDict(frozen=True)

    stage: int
    kind: str
    clients: Mapping[str, Assignment]
    left_out: dict[str, str] = {}
    discloses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def reshaped(self, model: Checkpoint) -> Checkpoint:
        """The model with the shapes that it has after the stage. Its weights may not exist yet, and are not to be read."""
        return model

    def uploads(self) -> int:
        """Bytes that all clients send in the whole stage."""
        return sum(assignment.upload for assignment in self.clients.values())


@dataclass(frozen=True)
class Result:
    """The result of a stage.

    Attributes:
        model: the model, with the stage's changes as overlays.
        adapters: folders of adapters that are written in addition to the merged model, by name.
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
            decoder: the model as it will be at the start of the stage; its weights may not exist yet.
            capabilities: the clients' capabilities, by name.

        Raises:
            FedgroveError: the stage cannot be done like this; names the key or the client, and a remedy.
        """
        ...

    def run(self, model: Checkpoint, plan: Any, config: Any, federation: Federation) -> Result:
        """Runs the stage. Results that are already in the run folder are not computed again."""
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
        """Measures the model that each of these clients would have without the others, on held-out windows by text."""
        ...

    def typical_memory(self, decoder: Decoder, length: int) -> dict[str, float]:
        """Bytes of memory that one client needs with usual settings, by a short description; for ``fedgrove doctor``."""
        ...


def stage_of(kind: str) -> Stage:
    """Loads the stage of a kind."""
    return cast(Stage, plugins.load(f"{STAGES}.{kind}", "stage", Stage))


def names_of(disclosures: frozenset[Disclosure]) -> tuple[str, ...]:
    """The names of disclosures, in the order of their definition, for a plan."""
    return tuple(one.name for one in Disclosure if one in disclosures)


def calibration_seed(seed: int, stage: int) -> str:
    """The seed from which a stage's calibration windows are drawn; each client appends its name."""
    return f"{seed}/{stage}"
