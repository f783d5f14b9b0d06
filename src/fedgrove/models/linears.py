"""Where the decoder blocks of a model are, and which of their modules are linears that can be pruned or tuned."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedgrove.errors import FedgroveError

_CROSS_ATTENTION = {"encoder_attn", "cross_attn", "crossattention", "cross_attention", "encoder_decoder_attention"}


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The decoder blocks of a model, and the name of the list that holds them.

    They are the longest ModuleList of modules of one class that contain linears.

    Raises:
        FedgroveError: there is no such list.
    """
    longest: tuple[str, list[nn.Module]] = ("", [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(longest[1]):
            blocks = list(module)
            if len({type(block) for block in blocks}) == 1 and linears(blocks[0]):
                longest = (name, blocks)
    if not longest[1]:
        raise FedgroveError(f"model: no decoder blocks found in {type(model).__name__}; fedgrove prunes decoder-only models")
    return longest


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The prunable linears of a block by name.

    Norms, embeddings and the head are never among them. Linears with a single output are gates, such as that of Qwen2-MoE's
    shared expert, and not prunable. Cross-attention (in the decoders of BART and others) is not run without an encoder.
    """
    modules = {name: module for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return {
        name: module
        for name, module in modules.items()
        if getattr(module, "out_features", None) != 1 and not _CROSS_ATTENTION & set(name.split("."))
    }
