"""Give each linear of a block the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from fedgrove.models.blocks import Call, Decoder, linears
from fedgrove.stages.prune.input_statistics import InputStatistics, Needs


class Adds(Protocol):
    """Something that sums over windows."""

    def add(self, x: Tensor) -> None:
        """Adds windows: x is (windows, tokens, in)."""
        ...


A = TypeVar("A", bound=Adds)

TOKENS_AT_ONCE = 512  # in float32: more are hardly faster on a CPU, and hold more memory


class _Seen(Exception):
    """Not an error: ends a block's run when its last linear has been reached."""


def windows_at_once(samples: int, length: int, compute: str | None = None) -> int:
    """How many windows go through a block together: a divisor of ``samples``, so that all runs are alike."""
    tokens = 2 * TOKENS_AT_ONCE if compute == "bfloat16" else TOKENS_AT_ONCE  # the same bytes
    return max(n for n in range(1, samples + 1) if samples % n == 0 and (n == 1 or n * length <= tokens))


@contextmanager
def shared_inputs(block: nn.Module, new: Callable[[str], A]) -> Iterator[dict[str, A]]:
    """WeightedSum over the inputs of every linear of a block, as often as the block is run.

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
    hooks.append(block.register_forward_pre_hook(lambda *_: seen.clear()))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def gather(
    decoder: Decoder,
    block: nn.Module,
    windows: Iterable[Tensor],
    call: Call,
    needs: Needs,
    keep: Callable[[Iterable[Tensor]], None] | None = None,
) -> dict[str, InputStatistics]:
    """Runs a block over calibration windows and sums what a pruner needs to know.

    Args:
        decoder: runs the block.
        block: one of its blocks, loaded.
        windows: hidden states that enter the block, (windows, tokens, width) each.
        call: what the block is called with besides.
        needs: what to sum.
        keep: takes what leaves the block; without it a run ends at the block's last linear.

    Returns:
        For each linear its inputs' sums; linears with one input hold the same object (see :func:`shared_inputs`).
    """
    if keep is not None:
        with shared_inputs(block, lambda name: InputStatistics(needs)) as inputs:
            keep(decoder.run(block, hidden, call) for hidden in windows)
        return inputs
    reached: list[str] = []  # linears in the order in which they were reached: what comes after the last of them is not needed

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if len(runs) == 1:
                reached.append(name)
            elif always and name == reached[-1]:
                raise _Seen

        return hook

    names = linears(block)
    runs: list[None] = []
    always = False
    with shared_inputs(block, lambda name: InputStatistics(needs)) as inputs:
        hooks = [module.register_forward_pre_hook(note(name)) for name, module in names.items()]
        try:
            for hidden in windows:
                runs.append(None)
                with suppress(_Seen):
                    decoder.run(block, hidden, call)
                always = sorted(reached) == sorted(names)  # not so where a block passes some of them by
        finally:
            for hook in hooks:
                hook.remove()
    return inputs
