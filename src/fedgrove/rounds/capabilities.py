"""What a client says of itself before anything is planned. It comes over the wire: the bounds are those of the job file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedgrove.job.units import Bits
from fedgrove.rounds.request import Reply

SPEED = 3e10  # float32 operations a second of a client of speed 1.0: about what two cores of a server do on small blocks


class Capabilities(Reply):
    """What a client has to work with.

    Attributes:
        memory: bytes that the planner may use; None: any.
        speed: relative to ``SPEED``.
        uplink, downlink: bits a second; None: sending takes no time.
        bits: in which it can hold frozen weights.
        devices: alike; memory and speed are those of each.
        tokens: of its text, by the length of the windows that it trains on.
        samples, sparsity: where the client wants others than the stage's.
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
