"""The exchange of :mod:`fedgrove.input_statistics.exchange`, for pruning on the server and for mending masks there.

With source "dense", hidden states pass through the client's own copy of the model. If the hidden-state cache is gone, the pass
starts again, so a client may miss any request. With "sequential", hidden states pass through the blocks that the server pruned.
Each request carries only the previous block, so a client whose cache is gone cannot continue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import decoder_of
from fedgrove.input_statistics import exchange
from fedgrove.input_statistics.exchange import limits
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import Response, Tensors
from fedgrove.stages.prune.config import Config


class SumInputs(exchange.SumInputs):
    """Sum, over your text, the statistics of one block's inputs that the server prunes or mends with.

    Attributes:
        mixed: whether products are summed only of inputs that are no wider than the hidden states.
    """

    KIND: ClassVar[str] = "prune/statistics"

    mixed: bool

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        if self.mixed and not set(self.products) <= set(narrow(self.widths, decoder_of(client, device))):
            raise client.error("the request is for products of inputs that mixed = true excludes; refused")
        return super().respond(tensors, client, device)

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        last = config.number_of_rounds() - 1  # votes are mended once, after the last round
        return range(last, last + 1)

    def beyond(self, job: Agreed) -> str | None:
        config, calibration, noise = job.stages[self.stage], self.calibration, self.noise
        assert isinstance(config, Config)
        if not config.sums_inputs:
            return "kind"
        if self.block == 0 and config.protect_first_block:
            return "protect_first_block"
        if calibration.through != "dense" and (
            config.calibration_source == "dense" or not calibration.through.startswith("server/")
        ):
            return "source"
        if calibration.compute_dtype != config.compute_dtype:
            return "compute_dtype"
        if calibration.windows_per_run != 1:
            return "windows_per_run"
        if self.products and not config.sums_products:
            return "products"
        if self.mixed != config.mixed:
            return "mixed"
        if self.moments != config.sums_moments:
            return "moments"
        if self.limit not in limits(calibration.tokens, len(job.clients), job.secure):
            return "limit"
        if (config.epsilon is None) != (noise is None):
            return "epsilon"
        if noise and (noise.epsilon != config.epsilon or noise.skips_first != config.protect_first_block):
            return "epsilon"
        return "delta" if noise and noise.delta != config.delta else None


def narrow(widths: Mapping[str, int], decoder: Decoder) -> tuple[str, ...]:
    """The inputs that are no wider than the hidden states.

    Args:
        widths: number of channels of each input.
    """
    hidden_size = decoder.checkpoint.config.get_text_config().hidden_size
    return tuple(name for name, width in widths.items() if width <= hidden_size)
