"""Writes a plain model directory that is made from another one, with one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fedgrove.models.files import CONFIG, INDEX, index_of, read_json, small_contents, without_code
from fedgrove.models.shared import SHARES
from fedgrove.models.tensor_files import write_safetensors


def write_plain(
    folder: Path,
    base: Path,
    shards: Mapping[str, Mapping[str, tuple[torch.Size, torch.dtype]]],
    read: Callable[[str], Tensor],
    config: Mapping[str, Any],
    texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a model into an existing folder, not atomically.

    Args:
        base: the directory of which the tokenizer and other small files are copied, but not which tensors are shared.
        shards: name of a weights file -> shape and dtype of its tensors by name, in file order. Without tensors there is no
            file.
        read: gives a tensor by its name.
        config: what config.json holds.
        texts: text files to add or to replace, name -> content.

    Raises:
        OSError: for example, the disk is full.
    """
    for name, content in small_contents(base).items():
        if name != SHARES:
            (folder / name).write_bytes(content)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for shard, specs in shards.items():
        if specs:
            write_safetensors(folder / shard, specs, map(read, specs))
    num_bytes = sum(shape.numel() * dtype.itemsize for specs in shards.values() for shape, dtype in specs.values())
    index = index_of({shard: list(specs) for shard, specs in shards.items()}, num_bytes)
    if index is not None:
        (folder / INDEX).write_text(index, encoding="utf-8")
    if config != without_code(read_json(base / CONFIG)):
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
