"""Walk through a model forwards and back, a block at a time: what the loss would lose with each channel and head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedgrove.models.blocks import Call, Decoder
from fedgrove.models.width import family_of, group_sums, width_of


class Store(Protocol):
    """Keeps what enters a block, window by window, on disk."""

    def write(self, index: int, windows: Iterable[Tensor], number: int) -> int:
        """Keeps the windows of a block; replaces what is there when all have come."""
        ...

    def read(self, index: int) -> Iterator[Tensor]:
        """Window by window, in order."""
        ...


def group_products(decoder: Decoder, ids: Tensor, store: Store) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """For every window and group Σ x·∂L/∂x over what the group hands to the linear that reads it.

    That is Σ w·∂L/∂w over the group's columns of the reader, and the derivative of L by a factor on the group: to first
    order, L falls by it when the group is cut. L is the window's negative log-likelihood in nats, summed over its tokens.

    In memory are the model's ends or one block, what one window keeps there for the way back, and nothing else: no gradient of
    a weight is formed, hidden states wait on disk, and the gradients that flow back take their place.

    Args:
        decoder: the model.
        ids: (windows, tokens) token ids.
        store: for (blocks + 1) × windows hidden states.

    Yields:
        From the last block to the first: its number, {"channels": (windows, channels), "heads": (windows, groups of heads)} in
        float64 on the CPU.
    """
    width, family = width_of(decoder.checkpoint.config), family_of(decoder.checkpoint.config)
    numbers = {family.channels.reader: ("channels", width.channels)}
    if family.heads is not None:
        numbers[family.heads.reader] = ("heads", width.heads)
    calls = decoder.embed(ids[:1])[1]
    store.write(0, (decoder.embed(window[None])[0] for window in ids), len(ids))
    for index in range(len(decoder)):
        with decoder.loaded(index) as block:
            store.write(index + 1, (decoder.run(block, h, calls[index]) for h in store.read(index)), len(ids))

    last = len(decoder)
    ends = zip(ids, store.read(last), strict=True)
    store.write(last, (_loss_gradient(decoder, window[None], h) for window, h in ends), len(ids))
    for index in reversed(range(len(decoder))):
        found: dict[str, list[Tensor]] = {kind: [] for kind, _ in numbers.values()}
        pairs = zip(store.read(index), store.read(index + 1), strict=True)
        store.write(index, _through(decoder, index, calls[index], pairs, numbers, found), len(ids))
        yield index, {kind: torch.stack(windows) for kind, windows in found.items()}


def _through(
    decoder: Decoder,
    index: int,
    call: Call,
    pairs: Iterable[tuple[Tensor, Tensor]],
    numbers: dict[str, tuple[str, int]],
    found: dict[str, list[Tensor]],
) -> Iterator[Tensor]:
    """For each (what entered a block, the gradient of what left it) the gradient of what entered; products go to ``found``."""
    with decoder.loaded(index) as block, _inputs(block, list(numbers)) as inputs:
        for hidden, gradient in pairs:
            with torch.enable_grad():
                hidden.requires_grad_()
                out = decoder.run(block, hidden, call)
                before, *slopes = torch.autograd.grad(out, [hidden, *(inputs[reader] for reader in numbers)], gradient)
            for (reader, (kind, number)), slope in zip(numbers.items(), slopes, strict=True):
                product = (inputs[reader].detach().double() * slope.double()).flatten(0, -2).sum(0)
                found[kind].append(group_sums(product, number).cpu())
            yield before


def _loss_gradient(decoder: Decoder, ids: Tensor, hidden: Tensor) -> Tensor:
    """∂L/∂(what left the last block), L summed over the predicted tokens of a window."""
    with torch.enable_grad():
        hidden.requires_grad_()
        logits = decoder.logits(ids, hidden)[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum")
        return torch.autograd.grad(loss, hidden)[0]


@contextmanager
def _inputs(block: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What enters linears of a block when it is run."""
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = cast(Tensor, args[0])

        return hook

    hooks = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
