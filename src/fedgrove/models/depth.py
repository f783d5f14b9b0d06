"""A model without some of its blocks: the names of its tensors, and its config.json.

Blocks that stay are numbered anew, so any program that loads the architecture loads the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from fedgrove.errors import FedgroveError
from fedgrove.job.units import MAX_BLOCKS, Index

if TYPE_CHECKING:  # whoever reads a job need not wait for transformers
    from transformers import PretrainedConfig

_OF_BLOCK = re.compile(r"((?:[^.]+\.)*?)(\d+)(\..+)")  # the first number in a tensor's name is that of its block
_NUMBER = "num_hidden_layers"
FURTHER_BLOCKS = ("num_mtp_layers", "num_nextn_predict_layers")  # after the last block, and only some programs use them
_NOT_OF_BLOCKS = re.compile(r"architectures|.*_token_ids?")  # lists of config.json that only by chance have an entry per block


def ascending(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Checks that indexes ascend.

    Raises:
        ValueError: they do not.
    """
    if any(one >= other for one, other in pairwise(blocks)):
        raise ValueError("the indexes must ascend")
    return blocks


KeptBlocks = Annotated[
    tuple[Annotated[Index, Field(lt=MAX_BLOCKS)], ...], Field(min_length=1, max_length=MAX_BLOCKS), AfterValidator(ascending)
]  # the indexes of the blocks that stay


def num_blocks(config: PretrainedConfig) -> int:
    """The number of blocks of a model."""
    return int(config.num_hidden_layers)


def renumbered(names: Iterable[str], kept: Sequence[int], moved: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The tensors of a model without some blocks: their new names -> their names in the full model, in the same order.

    Args:
        names: of tensors of the full model.
        kept: the indexes of the blocks that stay.
        moved: tensors that stay although their block goes: name in the full model -> new name.
    """
    place = {block: str(index) for index, block in enumerate(kept)}
    new = {}
    for name in names:
        parts = parts_of(name)
        if name in moved:
            new[moved[name]] = name
        elif parts is None:
            new[name] = name
        elif parts[1] in place:
            new[parts[0] + place[parts[1]] + parts[2]] = name
    return new


def parts_of(name: str) -> tuple[str, int, str] | None:
    """The name of a tensor before, at and after the number of its block; None if it is of no block."""
    match = _OF_BLOCK.fullmatch(name)
    return None if match is None else (match[1], int(match[2]), match[3])


def place_of(name: str) -> tuple[int, str]:
    """Sorts names of tensors by block, those of no block first, and then by name."""
    parts = parts_of(name)
    return (-1 if parts is None else parts[1]), name


def shorter_config(raw: Mapping[str, Any], config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The config.json of a model without some blocks.

    A list with an entry for each block, such as ``layer_types``, loses the entries of the blocks that go. It is also written if
    config.json lacks it and the architecture fills it in by a pattern, because the pattern would give the kept blocks other
    entries.

    Args:
        raw: the current config.json.
        config: the same as parsed by transformers, with defaults filled in.
        kept: the indexes of the blocks that stay, ascending.

    Raises:
        FedgroveError: a block computes something else at another place, which no configuration of this architecture undoes.
    """
    number = num_blocks(config)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise FedgroveError(
            f"depth: a configuration of type {config.model_type} with scale_attn_by_inverse_layer_idx scales the attention "
            "of a block by its place, so no block may go",
            "set it to 0",
        )
    lists = {
        key: [value[block] for block in kept]
        for key, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == number and not _NOT_OF_BLOCKS.fullmatch(key)
    }
    return {**raw, **lists, **_places_of_experts(config, kept), config.attribute_map.get(_NUMBER, _NUMBER): len(kept)}


def _places_of_experts(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The keys of config.json that say which blocks of a mixture of experts have any, for the blocks that stay.

    Further blocks, which predict several tokens at once, go with those that are cut: they follow the last block.
    """
    places: dict[str, Any] = {}
    first = getattr(config, "first_k_dense_replace", None)
    if first is not None:
        places["first_k_dense_replace"] = sum(block < first for block in kept)
    step = getattr(config, "decoder_sparse_step", None)
    if step is not None:
        dense = set(config.mlp_only_layers or ()) | {block for block in range(num_blocks(config)) if (block + 1) % step}
        places["decoder_sparse_step"] = 1
        places["mlp_only_layers"] = [place for place, block in enumerate(kept) if block in dense]
    return {**places, **{key: 0 for key in FURTHER_BLOCKS if getattr(config, key, None)}}
