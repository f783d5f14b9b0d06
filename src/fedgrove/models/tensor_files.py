"""Safetensors files, read and written tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedgrove.errors import FedgroveError, first_line
from fedgrove.files import atomic_file

SAFETENSORS_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically; ``tensors`` are in memory."""
    aligned = sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    )  # the order of the safetensors library
    specs = {name: (tensor.shape, tensor.dtype) for name, tensor in aligned}
    with atomic_file(path) as partial:
        write_safetensors(partial, specs, (tensor for _, tensor in aligned), metadata)


def write_safetensors(
    path: Path,
    specs: Mapping[str, tuple[torch.Size, torch.dtype]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file of any size with one tensor in memory at a time.

    Args:
        path: the file.
        specs: name, shape and dtype of every tensor, in file order.
        tensors: the tensors, in that order.
        metadata: strings for the header.

    Raises:
        OSError: for example, the disk is full.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (shape, dtype) in specs.items():
        size = shape.numel() * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned to eight bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors:
            if tensor.numel():
                file.write(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on any device; those of the CPU's memory itself if it is contiguous and there."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def header(file: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of a safetensors file, in file order."""
    try:
        modified = file.stat().st_mtime_ns
    except OSError:  # opening it says what is wrong
        modified = 0
    return _headers(file, modified)


@lru_cache(maxsize=4096)
def _headers(file: Path, modified: int) -> dict[str, Any]:  # `modified`, in nanoseconds, is part of the cache's key
    try:
        with safe_open(file, framework="pt") as reader:
            tensors = ((name, reader.get_slice(name)) for name in reader.offset_keys())
            entries = {name: {"dtype": part.get_dtype(), "shape": part.get_shape()} for name, part in tensors}
    except (SafetensorError, OSError) as error:
        raise FedgroveError(f"model: {file} is damaged ({first_line(error)})", "copy it again") from error
    return entries
