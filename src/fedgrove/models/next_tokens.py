"""The loss of the next tokens, with few logits in memory at a time.

The logits of four windows of 1,024 tokens and a vocabulary of 128,256 are 2 GB in float32, and the loss and its gradient need
three times as much again: more than a model of a billion weights. Here logits are made for some tokens at a time. Where a
gradient is wanted it is computed together with the loss, and only that of the hidden states is kept, so that nothing is
computed twice. Tokens that have no loss get no logits.

The idea is that of fused linear cross-entropy (Hsu et al., Liger Kernel, arXiv 2410.10989). Ours: no kernel of its own, and
logits come from the model's own code behind its last block, whatever that does with them (norms, caps, scales).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedgrove import heap
from fedgrove.data.windows import IGNORED
from fedgrove.models.cost import tokens_at_once
from fedgrove.models.linears import find_blocks
from fedgrove.models.replaced_blocks import BlocksReached, Call, Head, hidden_of, replaced_blocks, wrapping_of


def loss_sum(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """−Σ log p over the tokens whose label is not ``IGNORED``, each given the tokens before it.

    Args:
        model: of transformers. Hooks are on what is in its blocks, not on blocks. What comes after them has no trained
            parameters: it gets no gradient.
        ids, labels: (windows, length) int64.

    Returns:
        A float32 scalar; differentiable once, by everything trained that is in the blocks or before them.
    """
    _, blocks = find_blocks(model)
    ids = ids.to(next(model.parameters()).device)
    results: list[Any] = []
    last = blocks[-1]

    def run(_: int, hidden: Tensor, call: Call) -> Any:
        results.append(type(last).forward(last, hidden, *call[0], **call[1]))
        raise BlocksReached

    with _memory_watched(blocks, ids), replaced_blocks(blocks[-1:], run), suppress(BlocksReached):
        model(input_ids=ids, use_cache=False)
    return head_loss(Head(model, blocks, wrapping_of(results[0])), hidden_of(results[0]), labels)


@contextmanager
def _memory_watched(blocks: Sequence[nn.Module], ids: Tensor) -> Iterator[None]:
    """Within it a forward pass releases freed memory before a block if memory is tight.

    Between the activations that the backward pass needs there are holes, which are not used again.
    """
    grows = torch.is_grad_enabled() and ids.device.type == "cpu"
    hooks = [block.register_forward_pre_hook(lambda *_: heap.release_if_tight()) for block in blocks if grows]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def head_loss(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """:func:`loss_sum` from the hidden states after the last block, by which it is differentiable once.

    Args:
        head: makes logits; of at most ``length`` tokens at once, for which the model has positions.
        hidden: (windows, length, width).
        labels: (windows, length) int64.
    """
    wanted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).to(hidden.device)
    learnt = wanted != IGNORED
    at_once = tokens_at_once(head.vocabulary, labels.shape[1])
    return cast(Tensor, _Loss.apply(hidden[learnt], head, wanted[learnt], at_once))  # type: ignore[no-untyped-call]


class _Loss(torch.autograd.Function):
    """Computes the gradient in the forward pass, while the logits are there."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, head: Head, wanted: Tensor, at_once: int) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        for begin in range(0, len(hidden), at_once):
            some = slice(begin, begin + at_once)
            with torch.set_grad_enabled(gradient is not None):
                part = hidden[some].detach().requires_grad_(gradient is not None)
                loss = nn.functional.cross_entropy(head(part).float(), wanted[some], reduction="sum")
                if gradient is not None:
                    gradient[some] = torch.autograd.grad(loss, part)[0]
            total += loss.detach()
        if gradient is not None:
            context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * slopes[0], None, None, None
