"""A forward pass in which something else is done instead of running the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block, positional and by keyword, besides the hidden states


class BlocksReached(Exception):
    """Not an error: ends a forward pass when all blocks have been called."""


@contextmanager
def replaced_blocks(blocks: Sequence[nn.Module], function: Callable[[int, Tensor, Call], Any]) -> Iterator[None]:
    """Within it a model calls ``function`` instead of its blocks; the model's code still prepares masks and positions.

    Args:
        blocks: in the order in which they are run.
        function: gets a block's index, the hidden states, and the block's other arguments; returns what the block would.
    """

    def replacement(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return function(index, hidden, (args[1:], kwargs))

        return forward

    for index, block in enumerate(blocks):
        block.forward = replacement(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def hidden_of(result: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a tuple that begins with it."""
    hidden: Tensor = result[0] if isinstance(result, tuple | list) else result
    return hidden


def wrapping_of(result: Any) -> Callable[[Tensor], Any]:
    """Makes of hidden states what a block returns, from one of its results; nothing else in it is kept."""
    if not isinstance(result, tuple | list):
        return lambda hidden: hidden
    others = (None,) * (len(result) - 1)
    return lambda hidden: (hidden, *others)


@dataclass(frozen=True)
class Head:
    """What a model does after its last block: makes logits (tokens, vocabulary) of its output (tokens, width).

    A token's logits depend on its own row only, so that any rows can be given.

    Attributes:
        model, blocks: the model, and its blocks, which are not run.
        wrap: makes of hidden states what a block returns.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    wrap: Callable[[Tensor], Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)  # no block reads their embedding
        with replaced_blocks(self.blocks, lambda *_: self.wrap(hidden[None])):
            return cast(Tensor, self.model(input_ids=ids, use_cache=False, return_dict=True).logits[0])

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token, which can be more than the tokenizer has tokens."""
        return int(cast(Any, self.model).get_output_embeddings().weight.shape[0])
