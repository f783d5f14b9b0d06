"""Give each linear of a block the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from fedgrove.inputs import Inputs, Needs
from fedgrove.models.blocks import Call, Decoder, linears


class Adds(Protocol):
    """Something that sums over windows."""

    def add(self, x: Tensor) -> None:
        """Adds one window: x is (1, tokens, in)."""
        ...


A = TypeVar("A", bound=Adds)


@contextmanager
def watching(block: nn.Module, new: Callable[[str], A]) -> Iterator[dict[str, A]]:
    """Sums over the inputs of every linear of a block, as often as the block is run.

    Linears that read the same input (q, k and v; gate and up) share one statistic: four for a Llama block, not seven.

    Args:
        block: loaded, or without weights on the meta device.
        new: begins the sum of an input; given the first linear that reads it.

    Yields:
        For each linear its input's sum; linears with one input hold the same object. Filled when the block has run.
    """
    inputs: dict[str, A] = {}
    leaders: dict[str, A] = {}  # the first linear of each shared input: it alone does the sum
    seen: list[tuple[Tensor, int, A]] = []  # this window's inputs, kept alive so that no two can be one object

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
    hooks.append(block.register_forward_hook(lambda *_: seen.clear()))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def gather(decoder: Decoder, block: nn.Module, windows: Iterable[Tensor], call: Call, needs: Needs) -> dict[str, Inputs]:
    """Runs a block over calibration windows and sums what a pruner needs to know.

    Args:
        decoder: runs the block.
        block: one of its blocks, loaded.
        windows: hidden states that enter the block, (1, tokens, width) each.
        call: what the block is called with besides.
        needs: what to sum.

    Returns:
        For each linear its inputs' sums; linears with one input hold the same object (see :func:`watching`).
    """
    with watching(block, lambda name: Inputs(needs)) as inputs:
        for hidden in windows:
            decoder.run(block, hidden, call)
    return inputs
