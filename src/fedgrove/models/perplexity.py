"""Perplexity of a model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedgrove.events import OnProgress
from fedgrove.models.blocks import Decoder
from fedgrove.models.next_tokens import head_loss
from fedgrove.models.walk import walk


def negative_log_likelihood(
    decoder: Decoder, windows: Sequence[Tensor], on_progress: OnProgress = lambda done, total: None
) -> tuple[float, int]:
    """−Σ log p(token | the tokens before it in its window), in nats, and the number of tokens predicted.

    The first token of each window is not predicted. Blocks are loaded one after the other.

    Args:
        decoder: the model.
        windows: (1, tokens) token ids each.
        on_progress: called with (windows done, windows) after every block.
    """
    each = negative_log_likelihoods(decoder, windows, on_progress)
    return sum(total for total, _ in each), sum(count for _, count in each)


def negative_log_likelihoods(
    decoder: Decoder, windows: Sequence[Tensor], on_progress: OnProgress = lambda done, total: None
) -> list[tuple[float, int]]:
    """:func:`negative_log_likelihood` of each window, for confidence intervals."""
    each: list[tuple[float, int]] = []
    for passed, i, hidden in walk(decoder, windows, len(decoder), on_progress):
        if passed == len(decoder):
            ids = windows[i].long()
            each.append((float(head_loss(decoder.head, hidden, ids)), ids.numel() - 1))
    return each


def perplexity_of(total: float, count: float) -> float:
    """exp(total / count); infinity where that is too large for a float."""
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def perplexity(decoder: Decoder, windows: Sequence[Tensor], on_progress: OnProgress = lambda done, total: None) -> float:
    """exp of the mean negative log-likelihood per predicted token; windows do not overlap."""
    total, count = negative_log_likelihood(decoder, windows, on_progress)
    return perplexity_of(total, count)


def nll_of_logits(logits: Callable[[Tensor], Tensor], windows: Sequence[Tensor]) -> tuple[float, int]:
    """Like :func:`negative_log_likelihood`, for any function that computes logits.

    Args:
        logits: (1, tokens) token ids -> (1, tokens, vocabulary).
        windows: (1, tokens) token ids each.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in windows:
            target = ids[0, 1:].long()
            total += float(torch.nn.functional.cross_entropy(logits(ids)[0, :-1].float(), target, reduction="sum"))
            count += target.numel()
    return total, count
