"""Forward and backward pass block by block: how the loss changes to first order if a channel or head is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.next_tokens import head_loss
from fedgrove.models.replaced_blocks import Call
from fedgrove.models.width import CoupledLinears, columns_by_group, family_of, group_sums, rows_by_group, width_of

Weigh = Callable[[Tensor], Tensor]


class Store(Protocol):
    """A cache on disk of each block's input hidden states, window by window."""

    def write(self, index: int, windows: Iterable[Tensor], number: int) -> int:
        """Writes the ``number`` windows of a block, and only then replaces the block's previous windows."""
        ...

    def read(self, index: int) -> Iterator[Tensor]:
        """The windows of a block, in order."""
        ...


@dataclass(frozen=True)
class _Groups:
    """The groups of one kind in a block: their linears and their number."""

    part: CoupledLinears
    number: int


def group_products(
    decoder: Decoder, ids: Tensor, store: Store, of_weights: Weigh | None = None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Σ x·∂L/∂x for every window and group, where x are the group's activations at the input of the linear that reads them.

    This equals Σ w·∂L/∂w over the group's columns of that linear, and is the derivative of L with respect to a factor on the
    group: to first order, cutting the group lowers L by it. L is the window's negative log-likelihood in nats, summed over its
    tokens.

    Memory: either the embeddings and head or one block, and the activations of one window for its backward pass. No gradients
    of weights are computed, unless ``of_weights`` asks for those of the block. Hidden states are on disk, and are overwritten
    by the gradients during the backward pass.

    Args:
        decoder: the model.
        ids: (windows, tokens) token ids.
        store: for (blocks + 1) × windows hidden states.
        of_weights: instead of the above, sum what this function makes of w·∂L/∂w, number by number, over all weights of a group
            in all its linears.

    Yields:
        From the last block to the first: its index, {"channels": (windows, channels), "heads": (windows, groups of heads)} in
        float64 on the CPU.
    """
    width, family = width_of(decoder.checkpoint.config), family_of(decoder.checkpoint.config)
    groups = {"channels": _Groups(family.channels, width.channels)}
    if family.heads is not None:
        groups["heads"] = _Groups(family.heads, width.heads)
    calls = decoder.embed(ids[:1])[1]
    store.write(0, (decoder.embed(window[None])[0] for window in ids), len(ids))
    for index in range(len(decoder)):
        with decoder.loaded(index) as block:
            store.write(index + 1, (decoder.run(block, h, calls[index]) for h in store.read(index)), len(ids))

    last = len(decoder)
    outputs = zip(ids, store.read(last), strict=True)
    store.write(last, (_loss_gradient(decoder, window[None], h) for window, h in outputs), len(ids))
    for index in reversed(range(len(decoder))):
        products: dict[str, list[Tensor]] = {kind: [] for kind in groups}
        pairs = zip(store.read(index), store.read(index + 1), strict=True)
        backward = _backward if of_weights is None else partial(_backward_of_weights, weigh=of_weights)
        store.write(index, backward(decoder, index, calls[index], pairs, groups, products), len(ids))
        yield index, {kind: torch.stack(windows) for kind, windows in products.items()}


def _backward(
    decoder: Decoder,
    index: int,
    call: Call,
    pairs: Iterable[tuple[Tensor, Tensor]],
    groups: Mapping[str, _Groups],
    products: dict[str, list[Tensor]],
) -> Iterator[Tensor]:
    """The gradients of a block's inputs, window by window.

    Args:
        pairs: for each window, the block's input and the gradient of L with respect to the block's output.
        groups: by kind.
        products: the results of each window are appended to it, by kind.
    """
    readers = {kind: of.part.consumer for kind, of in groups.items()}
    with decoder.loaded(index) as block, _inputs(block, list(readers.values())) as inputs:
        for hidden, gradient in pairs:
            with torch.enable_grad():
                hidden.requires_grad_()
                out = decoder.run(block, hidden, call)
                read = [inputs[reader] for reader in readers.values()]
                before, *gradients = torch.autograd.grad(out, [hidden, *read], gradient)
            for (kind, of), x, of_input in zip(groups.items(), read, gradients, strict=True):
                product = (x.detach().double() * of_input.double()).flatten(0, -2).sum(0)
                products[kind].append(group_sums(product, of.number).cpu())
            yield before


def _backward_of_weights(
    decoder: Decoder,
    index: int,
    call: Call,
    pairs: Iterable[tuple[Tensor, Tensor]],
    groups: Mapping[str, _Groups],
    products: dict[str, list[Tensor]],
    weigh: Weigh,
) -> Iterator[Tensor]:
    """Like :func:`_backward`, but ``products`` gets the sums over each group's weights of what ``weigh`` makes of w·∂L/∂w."""
    with decoder.loaded(index) as block:
        names = [name for of in groups.values() for name in (*of.part.producers, of.part.consumer)]
        weights = {name: cast(nn.Parameter, block.get_submodule(name).weight) for name in names}
        for weight in weights.values():
            weight.requires_grad_()
        for hidden, gradient in pairs:
            with torch.enable_grad():
                hidden.requires_grad_()
                out = decoder.run(block, hidden, call)
                before, *gradients = torch.autograd.grad(out, [hidden, *weights.values()], gradient)
            by_name = dict(zip(names, gradients, strict=True))
            for kind, of in groups.items():
                total = torch.zeros(of.number, dtype=torch.float64, device=hidden.device)
                for name in (*of.part.producers, of.part.consumer):
                    product = as_matrix(block.get_submodule(name), weights[name].detach() * by_name.pop(name)).float()
                    split = columns_by_group if name == of.part.consumer else rows_by_group
                    total += weigh(split(product, of.number)).sum(1, dtype=torch.float64)
                products[kind].append(total.cpu())
            yield before


def _loss_gradient(decoder: Decoder, ids: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of L with respect to the last block's output; L is summed over the predicted tokens of the window."""
    with torch.enable_grad():
        hidden.requires_grad_()
        loss = head_loss(decoder.head, hidden, ids)
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
