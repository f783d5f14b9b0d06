"""Give each linear of a block the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fedgrove.inputs import Inputs, Needs
from fedgrove.models.blocks import Call, Decoder, linears


def gather(decoder: Decoder, block: nn.Module, windows: Iterable[Tensor], call: Call, needs: Needs) -> dict[str, Inputs]:
    """Runs a block over calibration windows and sums what a pruner needs to know.

    Linears that read the same input (q, k and v; gate and up) share one statistic: four for a Llama block, not seven.

    Args:
        decoder: runs the block.
        block: one of its blocks, loaded.
        windows: hidden states that enter the block, (1, tokens, width) each.
        call: what the block is called with besides.
        needs: what to sum.

    Returns:
        For each linear its inputs' sums; linears with one input hold the same object.
    """
    inputs: dict[str, Inputs] = {}
    leaders: dict[str, Inputs] = {}  # the first linear of each shared input: it alone does the sum
    seen: list[tuple[Tensor, int, Inputs]] = []  # this window's inputs, kept alive so that no two can be one object

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in inputs:
                for other, version, shared in seen:
                    if other is x and version == x._version:
                        inputs[name] = shared
                        return
                inputs[name] = leaders[name] = Inputs(needs)
            if name in leaders:
                leaders[name].add(x)
                seen.append((x, x._version, leaders[name]))

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears(block).items()]
    try:
        for hidden in windows:
            decoder.run(block, hidden, call)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs
