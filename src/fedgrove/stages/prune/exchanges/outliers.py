"""Before a stage prunes, every client measures the blocks of its own copy of the model, which decides their sparsities."""

from __future__ import annotations

from typing import ClassVar

import torch

from fedgrove.client.hidden_states import Calibration, HiddenStates
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import calibration_windows, decoder_of
from fedgrove.input_statistics.shared_inputs import shared_inputs
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Fraction, Name, Positive
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.aggregator.fixed_point import FixedPoint
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Request, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.prune.allocation import Options, allocation_of
from fedgrove.stages.prune.config import Config

CODE = FixedPoint(fraction_bits=32)
MEASURED = f"{CHANGE}measured"


class MeasureBlocks(Request):
    """Send one number in [0, 1] for each block of your model, as the allocation measures it on your text.

    The response holds ``change/measured``: (blocks,) int64, multiples of 2⁻³², times the client's number of windows.

    Attributes:
        allocation, owl_m, owl_lambda: see :mod:`fedgrove.stages.prune.allocation`.
        calibration: the windows.
    """

    KIND: ClassVar[str] = "prune/outliers"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.OUTLIERS})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"calibration.samples"})
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage",)

    allocation: Name
    owl_m: Positive
    owl_lambda: Fraction
    calibration: Calibration

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        method, calibration = allocation_of(self.allocation), self.calibration
        decoder = decoder_of(client, device, calibration.compute_dtype)
        states = HiddenStates(client, calibration, decoder)
        windows = calibration_windows(client, calibration.samples, calibration.length, calibration.seed)
        calls = decoder.embed(torch.zeros(1, calibration.length, dtype=torch.int64))[1]
        states.write(0, (decoder.embed(ids[None])[0] for ids in windows), len(windows))
        options = Options(self.owl_m, self.owl_lambda)
        measured = []
        for index in range(len(decoder)):
            with decoder.loaded(index) as block, shared_inputs(block, lambda name: InputStatistics(method.NEEDS)) as inputs:
                outputs = (decoder.run(block, hidden, calls[index]) for hidden in states.read(index))
                states.write(index + 1, outputs, len(windows))
            weights = {name: decoder.read_linear(index, name).to(decoder.device) for name in decoder.block_names(index)}
            measured.append(method.measure(weights, inputs, options))
            states.forget(before=index + 1)
        states.forget(before=len(decoder) + 1)
        values = CODE.encode(torch.tensor(measured, dtype=torch.float64)) * len(windows)
        return Response({MEASURED: values}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        return {MEASURED: (torch.Size([len(layout)]), torch.int64)}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        check_range(tensors[MEASURED], self.calibration.samples)

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return range(1)

    def beyond(self, job: Agreed) -> str | None:
        config, calibration = job.stages[self.stage], self.calibration
        assert isinstance(config, Config)
        if config.method.SOLVED_AT != "client":
            return "kind"
        if not config.measures_blocks:
            return "allocation"
        asked = (self.allocation, self.owl_m, self.owl_lambda, calibration.compute_dtype, calibration.through)
        agreed = (config.allocation, config.owl_m, config.owl_lambda, config.compute_dtype, "dense")
        if calibration.windows_per_run != 1:
            return "windows_per_run"
        names = ("allocation", "owl_m", "owl_lambda", "compute_dtype", "source")
        return next((name for name, one, other in zip(names, asked, agreed, strict=True) if one != other), None)


def check_range(measured: torch.Tensor, samples: int) -> None:
    """Refuses sums that cannot come from numbers in [0, 1].

    Args:
        measured: (blocks,) int64, multiples of 2⁻³², summed over windows.
        samples: the number of windows.

    Raises:
        WireError: a number is out of range.
    """
    if (measured < 0).any() or (measured > 2**CODE.fraction_bits * samples).any():
        raise WireError("a block's number is not between 0 and 1")
