"""The inputs of a block's linears while the block is run; linears that read the same input share one sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.linears import linears


class WindowSum(Protocol):
    """A sum over windows."""

    def add(self, x: Tensor) -> None:
        """Adds windows: x is (windows, tokens, in)."""
        ...


S = TypeVar("S", bound=WindowSum)


@contextmanager
def shared_inputs(block: nn.Module, new: Callable[[str], S]) -> Iterator[dict[str, S]]:
    """Adds the inputs of every linear of a block to sums, each time the block is run.

    Linears with the same input (q, k and v; gate and up) share one sum: a Llama block has four inputs, not seven.

    Args:
        block: loaded, or without weights on the meta device.
        new: creates the sum of an input, given the name of the first linear that reads it.

    Yields:
        The input's sum for each linear; linears with the same input map to the same object. Filled when the block is run.

    Raises:
        FedgroveError: the block was run, but not one of its linears.
    """
    inputs: dict[str, S] = {}
    leaders: dict[str, S] = {}  # by the first linear that reads each shared input; only this linear adds to the sum
    seen: list[tuple[Tensor, int, S]] = []  # this batch's inputs; kept alive, so that no new tensor gets the id of one

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in inputs:
                for other, version, shared in seen:
                    if other is x and version == x._version:
                        inputs[name] = shared
                        return
                inputs[name] = leaders[name] = new(name)
            if name in leaders:
                leaders[name].add(x)
                seen.append((x, x._version, leaders[name]))

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears(block).items()]
    hooks.append(block.register_forward_pre_hook(lambda *_: seen.clear()))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
    not_run = linears(block).keys() - inputs.keys()
    if inputs and not_run:
        raise FedgroveError(
            f"model: blocks of {type(block).__name__} do not run their linear {min(not_run)}", "take a model of another type"
        )


class Unsummed:
    """In place of a sum, for inputs that are not summed."""

    def add(self, x: Tensor) -> None:
        """Does nothing."""


@lru_cache(maxsize=1)  # a client asks for every block again, and the answer takes a pass through all blocks
def count_inputs(decoder: Decoder) -> Sequence[int]:
    """The number of different inputs that the linears of each block read; reads no weights of blocks."""
    hidden, calls = decoder.embed(torch.zeros(1, 2, dtype=torch.int64))
    counts = []
    for index in range(len(decoder)):
        with decoder.zeroed(index, hidden.dtype) as block, shared_inputs(block, lambda name: Unsummed()) as inputs:
            decoder.run(block, hidden, calls[index])
        counts.append(len({id(shared) for shared in inputs.values()}))
    return counts
