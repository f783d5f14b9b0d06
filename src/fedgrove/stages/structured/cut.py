"""The tensors of a block without the groups that were cut, its consumers repaired if sums of their inputs are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.width import CoupledLinears, Width, cut_columns, cut_rows, family_of, width_of
from fedgrove.stages.structured.repair import repair, shifted_bias

KINDS = ("channels", "heads")  # of groups
Kept = dict[str, Tensor]  # by kind, the ascending indices of the groups that stay


@dataclass(frozen=True)
class ConsumerInputs:
    """Sums over the inputs of a linear that reads groups, in the dense model.

    Attributes:
        halves: Σ x xᵀ of either half of the windows, (in, in) float64 each.
        means: E[x], (in,) float64; None if the linear has no bias.
    """

    halves: tuple[Tensor, Tensor]
    means: Tensor | None


def cut_parts(config: PretrainedConfig, after: Width) -> dict[str, CoupledLinears]:
    """The linears of the groups of which some go, by kind.

    Args:
        config: of the model before the cut.
        after: the widths of its blocks after it.
    """
    family, before = family_of(config), width_of(config)
    parts = {"channels": family.channels, "heads": family.heads}
    return {kind: part for kind, part in parts.items() if part is not None and getattr(after, kind) < getattr(before, kind)}


def cut_block(
    decoder: Decoder, block: int, kept: Kept, inputs: Mapping[str, ConsumerInputs] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a block that change, with only the groups ``kept``; names and layout are those of the checkpoint.

    Args:
        inputs: by kind of group, the sums with which the consumer is repaired; None: it is only cut.

    Returns:
        The tensors, and by kind of group how the repair went.
    """
    config, names = decoder.checkpoint.config, decoder.block_names(block)
    width, after = width_of(config), Width(*(len(kept[kind]) for kind in KINDS))
    cut: dict[str, Tensor] = {}
    repairs: dict[str, Any] = {}
    for kind, part in cut_parts(config, after).items():
        number = getattr(width, kind)
        for name in part.producers:
            module = decoder.blocks[block].get_submodule(name)
            weight = cut_rows(decoder.read_linear(block, name), number, kept[kind])
            cut[names[name]] = as_matrix(module, weight).contiguous()
            if has_bias(decoder, block, name):
                bias = _bias(names[name])
                cut[bias] = cut_rows(decoder.checkpoint.read(bias), number, kept[kind])
        module = decoder.blocks[block].get_submodule(part.consumer)
        before = decoder.read_linear(block, part.consumer)
        if inputs is None:
            weight = cut_columns(before, number, kept[kind])
        else:
            sums = inputs[kind]
            columns = torch.arange(before.shape[1]).view(number, -1)[kept[kind]].flatten().to(sums.halves[0].device)
            dense = before.to(columns.device)
            repaired = repair(dense, sums.halves, columns)
            weight = repaired.weight.to(before.dtype)
            repairs[kind] = {"ridge": repaired.ridge, "error": repaired.error}
            if sums.means is not None:
                bias = _bias(names[part.consumer])
                old = decoder.checkpoint.read(bias)
                cut[bias] = shifted_bias(old.to(columns.device), dense, weight, sums.means, columns).to(old.dtype).cpu()
            weight = weight.cpu()
        cut[names[part.consumer]] = as_matrix(module, weight).contiguous()
    return cut, repairs


def has_bias(decoder: Decoder, block: int, linear: str) -> bool:
    """Whether a linear of a block has a bias."""
    return getattr(decoder.blocks[block].get_submodule(linear), "bias", None) is not None


def _bias(weight: str) -> str:
    """The name of the bias beside a weight."""
    return weight.removesuffix("weight") + "bias"
