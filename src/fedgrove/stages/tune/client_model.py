"""What all requests of a tuning stage have in common: which model a client tunes, and on which windows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import training_windows
from fedgrove.job.units import MAX_BLOCKS, Bits, HeldOut, Length, Word
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.models.width import Width
from fedgrove.rounds.request import Request
from fedgrove.stages.tune.config import Config


class TuneRequest(Request):
    """A request that needs the model of a tuning stage.

    Attributes:
        parts: how many files the client has stored for :class:`~fedgrove.stages.tune.exchanges.base.KeepWeights`.
        width: of the blocks, if they are narrower than those of the client's own copy of the model; else None.
        bits: of each frozen weight.
        length: tokens of a window.
        seed: of the stage.
        personal: the fraction of its windows that the client holds out.
    """

    parts: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    width: Width | None
    bits: Bits
    length: Length
    seed: Word
    personal: HeldOut

    def model_and_windows(self, client: LocalClient, device: str) -> tuple[Decoder, Tensor, Tensor]:
        """The model without adapters, and this client's windows: token ids and labels, (windows, length) each.

        Raises:
            FedgroveError: the files of :class:`~fedgrove.stages.tune.exchanges.base.KeepWeights` are missing.
        """
        folder = base_folder(client, self.stage)
        if len(list(folder.glob("part-*.safetensors"))) < self.parts:
            raise client.error("its working files are gone; continue the run with --resume")
        checkpoint = Checkpoint(client.model, client.dtype, [folder] if self.parts else [], self.width)
        return Decoder(checkpoint, device), *training_windows(client, self.length)

    def beyond(self, config: object) -> str | None:
        assert isinstance(config, Config)
        if self.length != config.length:
            return "length"
        return "personal" if self.personal != config.personal else None


def base_folder(client: LocalClient, stage: int) -> Path:
    """Where a client stores the weights that earlier stages changed."""
    return client.folder / f"base-{stage}"


def best_folder(client: LocalClient, stage: int) -> Path:
    """Where a client stores its own best change."""
    return client.folder / f"best-{stage}"
