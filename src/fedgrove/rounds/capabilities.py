"""What a client reports about itself before the plan is made; checked with the bounds of the job file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedgrove.job.units import Bits
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
    """

    memory: Annotated[int, Field(gt=0)] | None = None
    speed: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    uplink: Annotated[int, Field(gt=0)] | None = None
    downlink: Annotated[int, Field(gt=0)] | None = None
    bits: tuple[Bits, ...] = (32, 16, 8, 4)
    devices: Annotated[int, Field(ge=1, le=64)] = 1
    tokens: dict[int, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    samples: Annotated[int, Field(gt=0)] | None = None
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
