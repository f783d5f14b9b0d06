"""What every stage is given to reach the clients: the engine, the run folder, and how sums are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fedgrove.engines.base import Engine
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.aggregator.base import Aggregator
from fedgrove.rounds.aggregator.open import OpenAggregator
from fedgrove.rounds.aggregator.secure import SecureAggregator
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.collect import Answer, collect
from fedgrove.rounds.request import Message
from fedgrove.runfolder import RunFolder


@dataclass(frozen=True)
class Federation:
    """The clients of a run, as its stages see them.

    Attributes:
        engine: reaches the clients.
        run: the run folder, with the job.
        device: where the server computes.
        aggregator: computes sums over clients, in the open or securely: a stage does not know which.
    """

    engine: Engine
    run: RunFolder
    device: str = "cpu"
    aggregator: Aggregator = field(init=False)

    def __post_init__(self) -> None:
        kind = SecureAggregator if self.job.privacy.secure_aggregation else OpenAggregator
        object.__setattr__(self, "aggregator", kind(self.engine, self.run))

    @property
    def job(self) -> Job:
        """The job that is run."""
        return self.run.job

    def clients(self) -> list[str]:
        """The clients that can get requests, sorted by name."""
        return self.engine.clients()

    def collect(
        self, messages: Mapping[str, Message], *, layout: Decoder | None = None, clock: Clock | None = None
    ) -> Iterator[Answer]:
        """Sends each client its message and yields the responses; see :func:`fedgrove.rounds.collect.collect`."""
        return collect(self.engine, self.run, messages, layout=layout, clock=clock)
