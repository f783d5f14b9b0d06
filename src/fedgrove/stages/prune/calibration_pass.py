"""The calibration pass through one block: collects the statistics of each linear's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from torch import Tensor, nn

from fedgrove.input_statistics.shared_inputs import shared_inputs
from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind
from fedgrove.models.blocks import Decoder
from fedgrove.models.linears import linears
from fedgrove.models.replaced_blocks import Call

TOKENS_AT_ONCE = 512  # in a float32 batch: larger batches take more memory and are hardly faster on a CPU


class _LastLinearReached(Exception):
    """Not an error: ends the block's forward pass at its last linear."""


def windows_at_once(samples: int, length: int, compute: str | None = None) -> int:
    """The number of windows in one batch; it divides ``samples``, so that all batches have the same size."""
    tokens = 2 * TOKENS_AT_ONCE if compute == "bfloat16" else TOKENS_AT_ONCE  # the same number of bytes as in float32
    most = max(1, min(samples, tokens // length))
    return max(n for n in range(1, most + 1) if samples % n == 0)


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
