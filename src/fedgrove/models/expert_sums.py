"""Sums over the tokens that reach each expert of a block, while text passes through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedgrove.models.blocks import Decoder
from fedgrove.models.experts import Experts, experts_in

TOKENS, OUTPUTS = "tokens", "outputs"


def blocks_with_experts(decoder: Decoder) -> list[int]:
    """The indexes of a model's blocks that have experts."""
    return [index for index, block in enumerate(decoder.blocks) if experts_in(block) is not None]


@contextmanager
def expert_sums(block: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """The sums over each window that passes through a block meanwhile, one after the other; none if it has no experts.

    For each expert, (experts,) float64 on the CPU: ``tokens``, the number of tokens that the router sends to it, and
    ``outputs``, Σ g·‖f‖₂ over them, where f is the expert's output and g the weight that the block gives it, with everything
    that the router does to it (normalized over the chosen experts, or scaled, as the architecture says).
    """
    experts, windows = experts_in(block), list[dict[str, Tensor]]()
    if experts is None:
        yield windows
        return
    weights: list[Tensor] = []

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        _, chosen, of_chosen = args
        numbers = range(len(list(module.children())))
        weights[:] = [of_chosen[chosen == index].double() for index in numbers]
        windows.append({name: torch.zeros(len(numbers), dtype=torch.float64) for name in (TOKENS, OUTPUTS)})

    def add(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            windows[-1][TOKENS][index] = len(out)
            windows[-1][OUTPUTS][index] = (weights[index] * out.double().norm(dim=-1)).sum()

        return hook

    hooks = [experts.register_forward_pre_hook(begin)]
    hooks += [expert.register_forward_hook(add(index)) for index, expert in enumerate(experts.children())]
    try:
        yield windows
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def tokens_of_experts(model: nn.Module) -> Iterator[list[Tensor]]:
    """Counts, for every block that has experts, how many tokens of what passes through a model meanwhile reach each.

    Yields:
        For each such block, (experts,) int64 on the CPU, in the order of its experts.
    """
    found = [module for module in model.modules() if isinstance(module, Experts)]
    counts = [torch.zeros(len(list(experts.children())), dtype=torch.int64) for experts in found]

    def count(total: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            total.add_(torch.bincount(args[1].flatten(), minlength=len(total)).cpu())

        return hook

    hooks = [experts.register_forward_pre_hook(count(total)) for experts, total in zip(found, counts, strict=True)]
    try:
        yield counts
    finally:
        for handle in hooks:
            handle.remove()
