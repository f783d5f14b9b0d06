"""Both halves of an exchange in which every client measures the model that it would have without the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import ComputeDtype, Name, Samples
from fedgrove.models.blocks import Decoder
from fedgrove.models.compute import dtype_of
from fedgrove.models.perplexity import negative_log_likelihoods
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.request import CHANGE, WEIGHT, Request, Tensors, TensorSpecs
from fedgrove.stages.base import Losses

WINDOW = "window/"  # tensors of a request: token ids to evaluate on

Windows = Mapping[str, list[Tensor]]  # of held-out text, by its name: (1, tokens) token ids


class MeasureAlone(Request):
    """A request to measure a model on text that the server sends. Each stage that can make the model has its own.

    Tensors sent with the request: ``window/<text>/<i>``: (1, tokens) token ids. The response holds for each text two float64
    tensors (windows,): ``change/<text>``, negative log-likelihoods in nats, and ``weight/<text>``, numbers of predicted tokens.

    Attributes:
        texts: number of windows of each held-out text.
        compute_dtype: the dtype in which the model is measured; None: the device's default.
    """

    texts: Annotated[dict[Name, Samples], Field(max_length=1000)]
    compute_dtype: ComputeDtype | None = None

    def check_windows(self, tensors: Tensors, client: LocalClient) -> None:
        """Refuses other tensors than the windows that the request names."""
        if tensors.keys() != {f"{WINDOW}{name}/{i}" for name, number in self.texts.items() for i in range(number)}:
            raise client.error("the windows that came are not those that the request names; refused")

    def measured(self, model: Checkpoint, device: str, tensors: Tensors) -> Tensors:
        """The tensors of the response for a model."""
        decoder = Decoder(model, device, dtype_of(self.compute_dtype, device))
        found: Tensors = {}
        for name, number in self.texts.items():
            windows = [tensors[f"{WINDOW}{name}/{i}"].long() for i in range(number)]
            each = torch.tensor(negative_log_likelihoods(decoder, windows), dtype=torch.float64)
            found[CHANGE + name], found[WEIGHT + name] = each[:, 0].contiguous(), each[:, 1].contiguous()
        return found

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        return {
            f"{part}{name}": (torch.Size([number]), torch.float64)
            for name, number in self.texts.items()
            for part in (CHANGE, WEIGHT)
        }

    def measuring_beyond(self, job: Agreed) -> str | None:
        """Part of :meth:`~fedgrove.rounds.request.Request.beyond`: how the model is measured."""
        return None if self.compute_dtype == job.measured_in else "compute_dtype"

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return range(1)


def number_of(windows: Windows) -> dict[str, int]:
    """The field ``texts`` of a request for these windows."""
    return {name: len(texts) for name, texts in windows.items()}


def tensors_of(windows: Windows) -> Tensors:
    """The tensors of a request for these windows."""
    return {f"{WINDOW}{name}/{i}": ids.int() for name, texts in windows.items() for i, ids in enumerate(texts)}


def losses_of(response: Mapping[str, Tensor], windows: Windows) -> Losses:
    """The losses in a response. The numbers of tokens are the server's own, not the client's."""
    return {
        name: list(zip(response[CHANGE + name].tolist(), [ids.numel() - 1 for ids in texts], strict=True))
        for name, texts in windows.items()
    }
