"""Before the plan is made, every client reports its capabilities, after checking that it has enough text."""

from __future__ import annotations

import importlib.util
from typing import Annotated, ClassVar

from pydantic import Field

from fedgrove.client.local_client import LocalClient
from fedgrove.client.speed import measured_speed
from fedgrove.client.windows import calibration_windows, training_windows
from fedgrove.job.stage_config import Agreed
from fedgrove.job.tables import MAX_STAGES
from fedgrove.job.units import Index, Length, Samples, Word
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.request import Disclosure, Part, Reply, Request, Response, Tensors
from fedgrove.rounds.wire import WireError


class Windows(Part):
    """Windows of text that a stage will calibrate on."""

    samples: Samples
    length: Length
    seed: Word


class DescribeYourself(Request):
    """Report your capabilities.

    Attributes:
        calibrations: the windows of stages that calibrate. They are drawn now, so that too little text is an error now.
        lengths: the window lengths, in tokens, of stages that train.
    """

    KIND: ClassVar[str] = "rounds/capabilities"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.CAPABILITIES})
    REPLY: ClassVar[type[Reply]] = Capabilities

    stage: Annotated[Index, Field(le=0)] = 0
    round: Annotated[Index, Field(le=0)] = 0
    calibrations: Annotated[tuple[Windows, ...], Field(max_length=MAX_STAGES)]
    lengths: Annotated[tuple[Length, ...], Field(max_length=MAX_STAGES)]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        for windows in self.calibrations:
            calibration_windows(client, windows.samples, windows.length, windows.seed)
        said = dict(client.capabilities)
        said["tokens"] = {length: training_windows(client, length)[0].numel() for length in self.lengths}
        labeled = [owner.answer is not None for owner in client.owners or (client,)]
        said["labels"] = "all" if all(labeled) else "some" if any(labeled) else "none"
        if importlib.util.find_spec("bitsandbytes") is None and "bits" in said:
            said["bits"] = [bits for bits in said["bits"] if bits >= 16]
        if said.get("speed") == "measure":
            said["speed"] = measured_speed(client, device)
        return Response({}, Capabilities(**said))

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Capabilities)
        if reply.tokens.keys() != set(self.lengths) or any(number < length for length, number in reply.tokens.items()):
            raise WireError("its numbers of tokens are not those of windows of the lengths that were asked for")
        if reply.samples is not None and any(windows.samples != reply.samples for windows in self.calibrations):
            raise WireError(f"it claims {reply.samples} calibration windows, not {self.calibrations[0].samples}")

    def beyond(self, job: Agreed) -> str | None:
        windows = [(index, stage.calibration_windows()) for index, stage in job.own_stages()]
        agreed = tuple(Windows(samples=one[0], length=one[1], seed=job.seed_of(index)) for index, one in windows if one)
        if self.calibrations != agreed:
            return "calibrations"
        lengths = tuple(length for length in (stage.training_length() for _, stage in job.own_stages()) if length is not None)
        return "lengths" if self.lengths != lengths else None
