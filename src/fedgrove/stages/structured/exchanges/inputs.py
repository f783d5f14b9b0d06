"""The exchange of :mod:`fedgrove.input_statistics.exchange`, for repairing the linears that read what was cut."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import calibration_windows, checkpoint_of, decoder_of
from fedgrove.input_statistics import exchange
from fedgrove.input_statistics.exchange import limits
from fedgrove.input_statistics.fixed_point import Statistic
from fedgrove.job.stage_config import Agreed
from fedgrove.models.width import family_of
from fedgrove.rounds.request import Response, Tensors
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.cut import has_bias

HALVES = ("first", "second")


class SumInputs(exchange.SumInputs):
    """Sum, over each half of your windows, the squares and products of the inputs of one block's linears that read what is cut.

    The sums of an input are ``change/<input>/first/squares`` and so on. A window's own tokens decide which half it is in, so it
    does not matter whose it is.
    """

    KIND: ClassVar[str] = "structured/inputs"

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        decoder = decoder_of(client, device)
        read = [reader for reader in _readers(client) if self.consumers.get(reader) in self.widths]
        if self.block < len(decoder) and self.moments != any(has_bias(decoder, self.block, reader) for reader in read):
            raise client.error("the request is for means of inputs, which only linears with a bias need; refused")
        return super().respond(tensors, client, device)

    def begin(self, name: str, scale: Tensor, client: LocalClient) -> exchange.InputSum:
        calibration = self.calibration
        if name not in {self.consumers[reader] for reader in _readers(client)}:
            raise client.error(f"no linear that reads what is cut has the input of {name}; refused")
        windows = calibration_windows(client, calibration.samples, calibration.length, calibration.seed)
        sums = [Statistic(part, scale, True, self.limit, moments=self.moments) for part in self.sums_of(name)]
        return _Halves(sums, iter([half_of(ids) for ids in windows]))

    def sums_of(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}/{half}" for half in HALVES)

    def beyond(self, job: Agreed) -> str | None:
        config, calibration = job.stages[self.stage], self.calibration
        assert isinstance(config, Config)
        if not config.repairs:
            return "repair"
        if self.noise is not None:
            return "epsilon"
        if self.products != tuple(sorted(self.widths)):
            return "products"
        if (calibration.through, calibration.windows_per_run, calibration.compute_dtype) != ("dense", 1, None):
            return "source"
        return None if self.limit in limits(calibration.tokens, len(job.clients), job.secure) else "limit"


def _readers(client: LocalClient) -> list[str]:
    """The linears of a block that read channels or heads."""
    family = family_of(checkpoint_of(client).config)
    return [part.consumer for part in (family.channels, family.heads) if part]


def half_of(ids: Tensor) -> int:
    """The half that a window of tokens is in: 0 or 1, at random, but always the same."""
    return hashlib.sha256(ids.int().numpy().tobytes()).digest()[0] & 1


@dataclass
class _Halves:
    """The sums of one input over either half of the windows.

    Attributes:
        sums: of the first and of the second half.
        places: for each window in order, its half.
    """

    sums: list[Statistic]
    places: Iterator[int]

    def add(self, x: Tensor) -> None:
        """Adds one window: (1, tokens, in)."""
        self.sums[next(self.places)].add(x)

    def tensors(self) -> Tensors:
        """See :class:`~fedgrove.input_statistics.fixed_point.Statistic`."""
        return self.sums[0].tensors() | self.sums[1].tensors()
