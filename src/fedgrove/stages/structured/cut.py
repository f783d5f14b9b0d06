"""What is cut: the choice of groups and blocks by their scores, and the tensors of a block without its groups."""

from __future__ import annotations

from torch import Tensor

from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.masks import lowest
from fedgrove.models.width import cut_columns, cut_rows, family_of, width_of

Kept = dict[str, Tensor]  # "channels" and "heads": ascending indices of the groups that stay


def kept_groups(scores: Tensor, number: int) -> Tensor:
    """The indices of the groups that stay, ascending: all but the ``len(scores) − number`` of the lowest score."""
    gone = lowest([scores], len(scores) - number)
    return (~gone).nonzero().squeeze(1)


def kept_blocks(influence: Tensor, num_blocks: int, number: int, protect_ends: bool) -> tuple[int, ...]:
    """The indices of the blocks that stay, ascending.

    Args:
        influence: of each block, (num_blocks,), or of each run of ``num_blocks − number`` blocks, by its first block.
        num_blocks: the number of blocks.
        number: how many of them stay.
        protect_ends: whether the first and the last block stay.
    """
    span = num_blocks - len(influence) + 1
    ends = 1 if protect_ends else 0
    inner = influence[ends : len(influence) - ends]
    cut = lowest([inner], (num_blocks - number) // span).nonzero().squeeze(1) + ends
    gone = {block for first in cut.tolist() for block in range(first, first + span)}
    return tuple(block for block in range(num_blocks) if block not in gone)


def cut_block(decoder: Decoder, block: int, kept: Kept) -> dict[str, Tensor]:
    """The tensors of a block that change, with only the groups ``kept``; names and layout are those of the checkpoint."""
    config = decoder.checkpoint.config
    family, width, names = family_of(config), width_of(config), decoder.block_names(block)
    cut: dict[str, Tensor] = {}
    for kind, part in (("channels", family.channels), ("heads", family.heads)):
        number = getattr(width, kind)
        if part is None or len(kept[kind]) == number:
            continue
        for name in part.producers:
            module = decoder.blocks[block].get_submodule(name)
            weight = cut_rows(decoder.read_linear(block, name), number, kept[kind])
            cut[names[name]] = as_matrix(module, weight).contiguous()
            if getattr(module, "bias", None) is not None:
                bias = names[name].removesuffix("weight") + "bias"
                cut[bias] = cut_rows(decoder.checkpoint.read(bias), number, kept[kind])
        module = decoder.blocks[block].get_submodule(part.consumer)
        weight = cut_columns(decoder.read_linear(block, part.consumer), number, kept[kind])
        cut[names[part.consumer]] = as_matrix(module, weight).contiguous()
    return cut
