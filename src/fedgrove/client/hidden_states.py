"""The hidden states that enter a block, for all calibration windows: on the client's disk, one window in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.data.sources import facts_of
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import write_safetensors


class Calibration(BaseModel):
    """What a client's hidden states depend on: the windows of text, and what they pass through. It is the cache's key.

    Whatever does not change hidden states has no place here: else they would be thrown away and computed anew.

    Attributes:
        stage, round: of the job.
        samples, length: windows, and tokens of each.
        seed: draws them.
        through: what the text passes through on its way to a block: "dense", the model as it came; "server", the blocks that
            the server pruned in the run of that name (``server/NAME``); "own", the blocks that this client pruned, by that
            recipe (``own/DIGEST``); "gradients", hidden states that are replaced by their gradients.
        windows_per_run: how many windows pass through a block together, and lie on disk together.
        compute_dtype: what the blocks compute in; None: the device's default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: int
    round: int = 0
    samples: int
    length: int
    seed: str
    through: str = "dense"
    windows_per_run: int = 1
    compute_dtype: str | None = None


class HiddenStates:
    """The cache of one calibration pass. Those of the newest block and of the one before it are kept, so that a request that
    comes again is answered again.

    Args:
        client: on whose disk they lie. What lies there of another pass goes.
        calibration: what they depend on, besides the client's text, model and device.
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
        """The last block up to ``index`` whose inputs are here."""
        return max((i for i in self._kept() if i <= index), default=None)

    def write(self, index: int, windows: Iterable[Tensor], number: int) -> int:
        """Keeps the states that enter block ``index``; written atomically."""
        partial = self._file(index).with_suffix(".partial")
        iterator = iter(windows)
        first = next(iterator)
        specs = {str(i): (first.shape, first.dtype) for i in range(number)}

        def all_windows() -> Iterator[Tensor]:
            yield first.cpu()
            for window in iterator:
                yield window.cpu()

        write_safetensors(partial, specs, all_windows())
        partial.replace(self._file(index))
        return index

    def read(self, index: int) -> Iterator[Tensor]:
        """Window by window, in order."""
        with safe_open(self._file(index), framework="pt") as file:
            number = len(list(file.keys()))
        for i in range(number):
            with safe_open(self._file(index), framework="pt", device=str(self.device)) as file:  # pages stay while it is open
                window = file.get_tensor(str(i))
            yield window

    def forget(self, before: int) -> None:
        """Removes the states that no request can need again."""
        for index in self._kept():
            if index < before:
                self._file(index).unlink()

    def _kept(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("*.safetensors")]

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"
