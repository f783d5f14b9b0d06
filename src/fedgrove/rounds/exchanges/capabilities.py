"""Before the plan is made, every client reports its capabilities, after checking that it has enough text."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from fedgrove.client.local_client import LocalClient
from fedgrove.client.speed import measured_speed
from fedgrove.client.windows import calibration_windows, training_windows
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.request import Disclosure, Index, Reply, Request, Response, Tensors


class Windows(BaseModel):
    """Windows of text that a stage will calibrate on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    length: int
    seed: str


class DescribeYourself(Request):
    """Report your capabilities.

    Attributes:
        calibrations: the windows of stages that calibrate. They are drawn now, so that too little text is an error now.
        lengths: the window lengths, in tokens, of stages that train.
    """

    KIND: ClassVar[str] = "rounds/capabilities"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.CAPABILITIES})
    REPLY: ClassVar[type[Reply]] = Capabilities

    stage: Index = 0
    calibrations: tuple[Windows, ...]
    lengths: tuple[int, ...]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        for windows in self.calibrations:
            calibration_windows(client, windows.samples, windows.length, windows.seed)
        said = dict(client.capabilities)
        said["tokens"] = {length: training_windows(client, length)[0].numel() for length in self.lengths}
        if importlib.util.find_spec("bitsandbytes") is None and "bits" in said:
            said["bits"] = [bits for bits in said["bits"] if bits >= 16]
        if said.get("speed") == "measure":
            said["speed"] = measured_speed(client, device)
        return Response({}, Capabilities(**said))
