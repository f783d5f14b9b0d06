"""Merging changes into the weights of a model, block by block."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.tune.parametrizations import Trainable


def write_merged(decoder: Decoder, method: Trainable, totals: Mapping[str, Any], masked: Container[str], folder: Path) -> None:
    """Writes the weights with their changes merged, one file per block, in the checkpoint's dtype.

    Args:
        totals: the complete change of each linear that changes.
        masked: the linears whose zeros stay zero.
    """
    for block in range(len(decoder)):
        merged = {}
        for linear, stored in decoder.block_names(block).items():
            name = f"{decoder.prefix}.{block}.{linear}"  # of a weight that blocks share, only the first is in ``totals``
            if name in totals:
                weight = method.merge(decoder.read_matrix(name), totals[name], name in masked)
                merged[stored] = as_matrix(decoder.model.get_submodule(name), weight).contiguous()
        if merged:
            save_tensors(merged, folder / f"block-{block:04d}.safetensors")
