"""What a client reports about itself before the plan is made; checked with the bounds of the job file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedgrove.job.endpoint import LogProbs
from fedgrove.job.tables import MAX_STAGES
from fedgrove.job.units import Bits, Devices, Length, Natural, Samples, Sparsity, Speed
from fedgrove.rounds.request import Reply

SPEED = 3e10  # float32 operations per second at speed 1.0: about what two cores of a server reach on small blocks


class Capabilities(Reply):
    """The resources of a client.

    Attributes:
        memory: bytes that the planner may use; None: any.
        speed: relative to ``SPEED``.
        uplink, downlink: bits per second; None: transfers take no time.
        bits: the bit widths in which it can hold frozen weights.
        devices: number of identical devices; memory and speed are per device.
        tokens: number of tokens of its training windows, by the length of the windows.
        samples, sparsity: the client's own values; None: those of the stage.
        labels: of its records, how many have a label: those of owners with the template ``answer``.
        endpoint: the log-probabilities that a completions server returns which runs its model; None: it runs it itself.
    """

    memory: Natural | None = None
    speed: Speed = 1.0
    uplink: Natural | None = None
    downlink: Natural | None = None
    bits: Annotated[tuple[Bits, ...], Field(max_length=4)] = (32, 16, 8, 4)
    devices: Devices = 1
    tokens: Annotated[dict[Annotated[Length, Field(strict=False)], Natural], Field(max_length=MAX_STAGES)] = Field(
        default_factory=dict  # keys of JSON are text
    )
    samples: Samples | None = None
    sparsity: Sparsity | None = None
    labels: Literal["all", "some", "none"] = "all"
    endpoint: LogProbs | None = None
