"""The hidden-state cache: the inputs of blocks for all calibration windows, on the client's disk."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from safetensors import safe_open
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.data.sources import facts_of
from fedgrove.job.units import ComputeDtype, Index, Length, Samples, Word
from fedgrove.models.blocks import Decoder
from fedgrove.models.tensor_files import write_safetensors
from fedgrove.rounds.request import Part, Reply
from fedgrove.rounds.wire import WireError


class Calibration(Part):
    """What hidden states depend on: the windows of text and the blocks that they pass through. It is the cache's key.

    Add no field that does not change hidden states: a different value would discard the cache for nothing.

    Attributes:
        stage, round: the indexes of the stage in the job and of the round in the stage.
        samples, length: number of windows, and tokens per window.
        seed: the seed by which windows are drawn.
        through: which blocks the text passes through before the current one. "dense": those of the original model;
            ``server/NAME``: those that the server pruned in the run NAME; ``own/DIGEST``: those that this client pruned
            by the recipe with that digest; "gradients": hidden states that are replaced by their gradients.
        windows_per_run: how many windows pass through a block, and are stored, as one tensor; divides ``samples``.
        compute_dtype: the dtype that blocks compute in; None: the device's default.
    """

    stage: Index
    round: Index = 0
    samples: Samples
    length: Length
    seed: Word
    through: Annotated[str, Field(pattern=r"^(dense|gradients|own/[0-9a-f]{16}|server/[A-Za-z0-9._-]{1,64})$")] = "dense"
    windows_per_run: Samples = 1
    compute_dtype: ComputeDtype | None = None

    @model_validator(mode="after")
    def _whole_runs(self) -> Self:
        if self.samples % self.windows_per_run:
            raise ValueError(f"windows_per_run: {self.windows_per_run} does not divide samples = {self.samples}")
        return self

    @property
    def tokens(self) -> int:
        """In all windows together."""
        return self.samples * self.length


class Tokens(Reply):
    """The number of tokens that a client calibrated on."""

    tokens: int

    def check(self, calibration: Calibration) -> None:
        """Checks it against the request.

        Raises:
            WireError: it is another number.
        """
        if self.tokens != calibration.tokens:
            raise WireError(f"it claims {self.tokens} tokens, not {calibration.tokens}")


class HiddenStates:
    """The hidden-state cache of one calibration pass.

    Only one tensor is in memory at a time. Callers keep the inputs of the newest block, and those of the block before
    it if a repeated request needs them; :meth:`forget` deletes the others.

    Args:
        client: the client on whose disk the cache is. Caches of other passes there are deleted.
        calibration: the cache's key, together with the client's text, model and device.
        decoder: the client's model.
    """

    def __init__(self, client: LocalClient, calibration: Calibration, decoder: Decoder):
        files = [facts_of(path) for path in client.data]
        facts = [calibration.model_dump(), files, client.text, decoder.checkpoint.fingerprint(), str(decoder.device)]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = client.folder / f"states-{key}"
        self.device = decoder.device
        self.folder.mkdir(parents=True, exist_ok=True)
        for other in client.folder.glob("states-*"):
            if other != self.folder:
                for file in other.iterdir():
                    file.unlink()
                other.rmdir()

    def latest(self, index: int) -> int | None:
        """The last block up to ``index`` whose inputs are in the cache; None if there is none."""
        return max((i for i in self._kept() if i <= index), default=None)

    def write(self, index: int, windows: Iterable[Tensor], number: int) -> int:
        """Stores the inputs of block ``index`` atomically; returns ``index``.

        Args:
            windows: the hidden states in order, all of the shape and dtype of the first.
            number: how many there are.
        """
        partial = self._file(index).with_suffix(".partial")
        iterator = iter(windows)
        first = next(iterator)
        specs = {str(i): (first.shape, first.dtype) for i in range(number)}

        write_safetensors(partial, specs, itertools.chain([first], iterator))
        partial.replace(self._file(index))
        return index

    def read(self, index: int) -> Iterator[Tensor]:
        """Yields the inputs of block ``index`` in order, on the decoder's device."""
        with safe_open(self._file(index), framework="pt") as file:
            number = len(list(file.keys()))
        for i in range(number):
            # Opened for each window, because its pages stay in memory while the file is open.
            with safe_open(self._file(index), framework="pt") as file:
                window = file.get_tensor(str(i))
            yield window.to(self.device)

    def forget(self, before: int) -> None:
        """Deletes the inputs of all blocks before block ``before``."""
        for index in self._kept():
            if index < before:
                self._file(index).unlink()

    def _kept(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("*.safetensors")]

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"
