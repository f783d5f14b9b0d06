"""The calibration pass through one block: collects the statistics of each linear's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Call, Decoder, linears
from fedgrove.stages.prune.input_statistics import InputStatistics, StatisticsKind


class WindowSum(Protocol):
    """A sum over windows."""

    def add(self, x: Tensor) -> None:
        """Adds windows: x is (windows, tokens, in)."""
        ...


S = TypeVar("S", bound=WindowSum)

TOKENS_AT_ONCE = 512  # in a float32 batch: larger batches take more memory and are hardly faster on a CPU


class _LastLinearReached(Exception):
    """Not an error: ends the block's forward pass at its last linear."""


def windows_at_once(samples: int, length: int, compute: str | None = None) -> int:
    """The number of windows in one batch; it divides ``samples``, so that all batches have the same size."""
    tokens = 2 * TOKENS_AT_ONCE if compute == "bfloat16" else TOKENS_AT_ONCE  # the same number of bytes as in float32
    most = max(1, min(samples, tokens // length))
    return max(n for n in range(1, most + 1) if samples % n == 0)


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


def gather(
    decoder: Decoder,
    block: nn.Module,
    windows: Iterable[Tensor],
    call: Call,
    kind: StatisticsKind,
    save_outputs: Callable[[Iterable[Tensor]], None] | None = None,
) -> dict[str, InputStatistics]:
    """Runs a block over calibration windows and sums the statistics that a pruner needs.

    Args:
        decoder: runs the block.
        block: one of its blocks, loaded.
        windows: the block's input hidden states, (windows, tokens, width) each.
        call: the block's other arguments.
        kind: which statistics to sum.
        save_outputs: consumes the block's outputs; without it each forward pass ends at the block's last linear.

    Returns:
        The statistics of each linear's inputs; linears with the same input map to the same object (see :func:`shared_inputs`).
    """
    if save_outputs is not None:
        with shared_inputs(block, lambda name: InputStatistics(kind)) as inputs:
            save_outputs(decoder.run(block, hidden, call) for hidden in windows)
        return inputs
    reached: list[str] = []  # linears in the order of the first forward pass; computation after the last one is skipped

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if len(runs) == 1:
                reached.append(name)
            elif all_reached and name == reached[-1]:
                raise _LastLinearReached

        return hook

    names = linears(block)
    runs: list[None] = []
    all_reached = False
    with shared_inputs(block, lambda name: InputStatistics(kind)) as inputs:
        hooks = [module.register_forward_pre_hook(note(name)) for name, module in names.items()]
        try:
            for hidden in windows:
                runs.append(None)
                with suppress(_LastLinearReached):
                    decoder.run(block, hidden, call)
                all_reached = sorted(reached) == sorted(names)  # False if the block skips some linears
        finally:
            for hook in hooks:
                hook.remove()
    return inputs


class _Unsummed:
    """In place of a sum, where inputs are only counted."""

    def add(self, x: Tensor) -> None:
        """Does nothing."""


@lru_cache(maxsize=1)  # a client asks for every block again, and the answer takes a pass through all blocks
def count_inputs(decoder: Decoder) -> Sequence[int]:
    """The number of different inputs that the linears of each block read; reads no weights of blocks."""
    hidden, calls = decoder.embed(torch.zeros(1, 2, dtype=torch.int64))
    counts = []
    for index in range(len(decoder)):
        with decoder.zeroed(index, hidden.dtype) as block, shared_inputs(block, lambda name: _Unsummed()) as inputs:
            decoder.run(block, hidden, calls[index])
        counts.append(len({id(shared) for shared in inputs.values()}))
    return counts
