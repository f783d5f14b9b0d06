"""Forward and backward pass block by block: how the loss changes to first order if a channel or head is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedgrove.models.blocks import Call, Decoder
from fedgrove.models.width import family_of, group_sums, width_of


class Store(Protocol):
    """A cache on disk of each block's input hidden states, window by window."""

    def write(self, index: int, windows: Iterable[Tensor], number: int) -> int:
        """Writes the ``number`` windows of a block, and only then replaces the block's previous windows."""
        ...

    def read(self, index: int) -> Iterator[Tensor]:
        """The windows of a block, in order."""
        ...


def group_products(decoder: Decoder, ids: Tensor, store: Store) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Σ x·∂L/∂x for every window and group, where x are the group's activations at the input of the linear that reads them.

    This equals Σ w·∂L/∂w over the group's columns of that linear, and is the derivative of L with respect to a factor on the
    group: to first order, cutting the group lowers L by it. L is the window's negative log-likelihood in nats, summed over its
    tokens.

    Memory: either the embeddings and head or one block, and the activations of one window for its backward pass. No gradients
    of weights are computed; hidden states are on disk, and are overwritten by the gradients during the backward pass.

    Args:
        decoder: the model.
        ids: (windows, tokens) token ids.
        store: for (blocks + 1) × windows hidden states.

    Yields:
        From the last block to the first: its index, {"channels": (windows, channels), "heads": (windows, groups of heads)} in
        float64 on the CPU.
    """
    width, family = width_of(decoder.checkpoint.config), family_of(decoder.checkpoint.config)
    groups = {family.channels.consumer: ("channels", width.channels)}
    if family.heads is not None:
        groups[family.heads.consumer] = ("heads", width.heads)
    calls = decoder.embed(ids[:1])[1]
    store.write(0, (decoder.embed(window[None])[0] for window in ids), len(ids))
    for index in range(len(decoder)):
        with decoder.loaded(index) as block:
            store.write(index + 1, (decoder.run(block, h, calls[index]) for h in store.read(index)), len(ids))

    last = len(decoder)
    outputs = zip(ids, store.read(last), strict=True)
    store.write(last, (_loss_gradient(decoder, window[None], h) for window, h in outputs), len(ids))
    for index in reversed(range(len(decoder))):
        products: dict[str, list[Tensor]] = {kind: [] for kind, _ in groups.values()}
        pairs = zip(store.read(index), store.read(index + 1), strict=True)
        store.write(index, _backward(decoder, index, calls[index], pairs, groups, products), len(ids))
        yield index, {kind: torch.stack(windows) for kind, windows in products.items()}


def _backward(
    decoder: Decoder,
    index: int,
    call: Call,
    pairs: Iterable[tuple[Tensor, Tensor]],
    groups: dict[str, tuple[str, int]],
    products: dict[str, list[Tensor]],
) -> Iterator[Tensor]:
    """The gradients of a block's inputs, window by window.

    Args:
        pairs: for each window, the block's input and the gradient of L with respect to the block's output.
        groups: by linear that reads groups, the kind of group and the number of groups.
        products: the results of each window are appended to it, by kind.
    """
    with decoder.loaded(index) as block, _inputs(block, list(groups)) as inputs:
        for hidden, gradient in pairs:
            with torch.enable_grad():
                hidden.requires_grad_()
                out = decoder.run(block, hidden, call)
                before, *gradients = torch.autograd.grad(out, [hidden, *(inputs[reader] for reader in groups)], gradient)
            for (reader, (kind, number)), of_input in zip(groups.items(), gradients, strict=True):
                product = (inputs[reader].detach().double() * of_input.double()).flatten(0, -2).sum(0)
                products[kind].append(group_sums(product, number).cpu())
            yield before


def _loss_gradient(decoder: Decoder, ids: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of L with respect to the last block's output; L is summed over the predicted tokens of the window."""
    with torch.enable_grad():
        hidden.requires_grad_()
        logits = decoder.logits(ids, hidden)[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum")
        return torch.autograd.grad(loss, hidden)[0]


@contextmanager
def _inputs(block: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """The inputs of linears of a block, recorded when it is run."""
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
