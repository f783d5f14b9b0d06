"""Lossless compression: a zero takes one bit, the bytes of other values are compressed. `--to hf` restores the model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.exports import Source
from fedgrove.models.blocks import Decoder
from fedgrove.models.files import INDEX, PACKED, index_of, small_contents
from fedgrove.models.perplexity import negative_log_likelihood
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import raw_bytes, write_safetensors
from fedgrove.rounds import wire

WHAT = "packed: lossless, one bit per zero"
EXACT = True
USE = """Unpack it, which restores every bit, then load it like any other model:

```sh
fedgrove export FOLDER --to hf --out plain
```"""
LAYOUT = PACKED
FILES = "files.packed"
PART = 2**28  # bytes of tensors in one packed file, and thus in memory when packing or unpacking


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed model."""
    return (folder / LAYOUT).is_file()


def write(source: Source, out: Path) -> None:
    """Packs a model directory, about 256 MiB at a time.

    Raises:
        FedgroveError: the model is already packed.
    """
    if is_packed(source.model):
        raise FedgroveError(f"{source.model} is packed already")
    checkpoint = Checkpoint(source.model)
    parts: list[list[str]] = [[]]
    remaining = PART
    for name in checkpoint.names():
        shape, dtype = checkpoint.spec(name)
        size = shape.numel() * dtype.itemsize
        if parts[-1] and size > remaining:
            parts.append([])
            remaining = PART
        parts[-1].append(name)
        remaining -= size
    for number, names in enumerate(parts):
        message = wire.pack({name: checkpoint.read(name) for name in names}, {})
        (out / _part(number)).write_bytes(message)
    contents = small_contents(source.model)
    files = {name: torch.from_numpy(np.frombuffer(content, np.uint8).copy()) for name, content in contents.items()}
    (out / FILES).write_bytes(wire.pack(files, {}))
    (out / LAYOUT).write_text(json.dumps({"format": 1, "shards": checkpoint.shards, "parts": parts}) + "\n")


def unpack(source: Path, out: Path) -> None:
    """The inverse of :func:`write`: the same tensors, bit for bit, in the same files.

    Raises:
        FedgroveError: a part is missing or damaged, or was packed by a newer version of fedgrove.
    """
    layout = _layout(source / LAYOUT)
    part_of = {name: number for number, names in enumerate(layout["parts"]) for name in names}

    @lru_cache(maxsize=1)
    def part(number: int) -> dict[str, Tensor]:
        tensors = _open(source / _part(number))
        if tensors.keys() != set(layout["parts"][number]):
            raise FedgroveError(f"{source / LAYOUT}: it does not belong to {_part(number)}", "copy it again")
        return tensors

    for file, content in _open(source / FILES).items():
        (out / Path(file).name).write_bytes(raw_bytes(content))
    num_bytes = 0
    for shard, names in layout["shards"].items():
        specs = {name: (part(part_of[name])[name].shape, part(part_of[name])[name].dtype) for name in names}
        write_safetensors(out / Path(shard).name, specs, (part(part_of[name])[name] for name in names))
        num_bytes += sum(shape.numel() * dtype.itemsize for shape, dtype in specs.values())
    index = index_of({Path(shard).name: names for shard, names in layout["shards"].items()}, num_bytes)
    if index is not None:
        (out / INDEX).write_text(index, encoding="utf-8")


def losses(source: Source, folder: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    """Computed on the unpacked model, in a temporary folder next to ``folder``."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as plain:
        unpack(folder, Path(plain))
        return negative_log_likelihood(Decoder(Checkpoint(Path(plain))), windows)


def _layout(file: Path) -> dict[str, Any]:
    """Reads ``packed.json``: the part and the model file of each tensor."""
    try:
        layout: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if layout["format"] != 1:
            raise FedgroveError(f"{file}: format {layout['format']} is unknown", "update fedgrove")
        in_parts = sorted(name for names in layout["parts"] for name in names)
        in_shards = sorted(name for names in layout["shards"].values() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedgroveError(f"{file}: missing or damaged", "copy it again") from error
    if in_parts != in_shards:
        raise FedgroveError(f"{file}: missing or damaged", "copy it again")
    return layout


def _open(file: Path) -> dict[str, Tensor]:
    try:
        return wire.unpack(file.read_bytes())[0]
    except (OSError, wire.WireError) as error:
        raise FedgroveError(f"{file}: missing or damaged", "copy it again") from error


def _part(number: int) -> str:
    return f"model-{number + 1:05d}.packed"
