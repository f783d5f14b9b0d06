"""Hidden states of texts that share their beginnings: what is shared passes through the model once.

A tree of texts is a list of nodes: embeddings that follow those of another node. Every row of a node continues one row of
its parent, and reads the keys and values that the parent's rows left behind. Trees pass through the model block by block,
as in :mod:`fedgrove.models.walk`: one block's weights, and one tree's keys and values in that block, are in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.replaced_blocks import Call

KNOWN = (DynamicLayer, DynamicSlidingWindowLayer)  # what a block keeps is its keys and values
ROWS = 64  # of hidden states whose logits are in memory at once


class Node(NamedTuple):
    """A piece of text in a tree.

    Attributes:
        parent: the index of the node that it follows, an earlier one of the tree; None: the tree begins here.
        embeddings: (rows, tokens, width) as the model's embedding gives them. The rows are a multiple of the parent's: row r
            continues row r // (rows / rows of the parent).
    """

    parent: int | None
    embeddings: Tensor


def embed(decoder: Decoder, ids: Tensor) -> Tensor:
    """What the model's embedding gives for token ids of any shape: (…, width), in the dtype of computation."""
    decoder.calls(1, 1)  # loads the embedding
    with torch.no_grad():
        return cast(Tensor, cast(Any, decoder.model).get_input_embeddings()(ids.to(decoder.device)))


def last_states(decoder: Decoder, trees: Sequence[Sequence[Node]]) -> list[list[Tensor]]:
    """What the last block makes of every node: for each tree and node (rows, tokens, width).

    A tree's states do not depend on the other trees.

    Raises:
        FedgroveError: the model keeps more between tokens than keys and values.
    """
    empty = _empty(decoder)
    calls: dict[tuple[int, int, int], list[Call]] = {}
    hidden = [[_begin(decoder, empty, tree, i, calls) for i in range(len(tree))] for tree in trees]
    for index in range(len(decoder)):
        with decoder.loaded(index) as block, torch.no_grad():
            for tree, states in zip(trees, hidden, strict=True):
                caches: dict[int, DynamicCache] = {}
                parents = {node.parent for node in tree}
                for i in range(len(tree)):
                    cache = _continued(empty, tree, i, index, caches)
                    states[i] = decoder.run(block, states[i], _with_cache(calls[_shape(tree, i)][index], cache))
                    if i in parents:
                        caches[i] = cache
    return hidden


def log_probabilities(decoder: Decoder, states: Tensor, targets: Tensor) -> Tensor:
    """log p of the next token, from the last block's output.

    Args:
        states: (rows, width).
        targets: (rows, n) ids of possible next tokens.

    Returns:
        (rows, n) float32 on the CPU. Only ``ROWS`` rows of logits are in memory at once.
    """
    found = []
    for rows, ids in zip(torch.split(states, ROWS), torch.split(targets, ROWS), strict=True):
        with torch.no_grad():
            logits = decoder.head(rows)
        found.append(logits.float().log_softmax(-1).gather(1, ids.to(logits.device)).cpu())
    return torch.cat(found)


def _past(tree: Sequence[Node], node: int) -> int:
    """How many tokens are before a node."""
    parent = tree[node].parent
    return 0 if parent is None else _past(tree, parent) + tree[parent].embeddings.shape[1]


def _shape(tree: Sequence[Node], node: int) -> tuple[int, int, int]:
    rows, tokens, _ = tree[node].embeddings.shape
    return rows, tokens, _past(tree, node)


def _begin(
    decoder: Decoder, empty: DynamicCache, tree: Sequence[Node], node: int, calls: dict[tuple[int, int, int], list[Call]]
) -> Tensor:
    """The first block's input, and in ``calls`` the blocks' other arguments, with a cache in them that is a stand-in."""
    shape = _shape(tree, node)
    stand_in = copy.copy(empty)
    stand_in.layers = list(map(copy.copy, empty.layers))
    for layer in stand_in.layers if shape[2] else ():  # masks and positions follow from the length alone
        layer.update(*[torch.zeros(1, 1, shape[2], 1, device=decoder.device)] * 2)
    hidden, found = decoder.begin(inputs_embeds=tree[node].embeddings, past_key_values=stand_in, use_cache=True)
    calls.setdefault(shape, found)
    return hidden


def _empty(decoder: Decoder) -> DynamicCache:
    cache, config = DynamicCache(config=decoder.checkpoint.config), decoder.checkpoint.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0) or any(type(one) not in KNOWN for one in cache.layers):
        raise FedgroveError(
            f"model: type {config.model_type} keeps more between tokens than each block's own keys and values",
            "take a model of another type",
        )
    return cache


def _continued(
    empty: DynamicCache, tree: Sequence[Node], node: int, index: int, caches: Mapping[int, DynamicCache]
) -> DynamicCache:
    """A cache with the keys and values of block ``index`` that a node's rows continue."""
    parent = tree[node].parent
    cache = copy.copy(empty)
    cache.layers = list(empty.layers)
    # a copy, whose tensors are replaced, not changed, when it grows
    cache.layers[index] = copy.copy((empty if parent is None else caches[parent]).layers[index])
    if parent is not None:
        cache.layers[index].batch_repeat_interleave(len(tree[node].embeddings) // len(tree[parent].embeddings))
    return cache


def _with_cache(call: Call, cache: DynamicCache) -> Call:
    """A block's arguments with a cache instead of the stand-in."""

    def swap(value: Any) -> Any:
        return cache if isinstance(value, DynamicCache) else value

    return tuple(map(swap, call[0])), {name: swap(value) for name, value in call[1].items()}
