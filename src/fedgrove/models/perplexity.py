"""Perplexity: how surprised a model is by text it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedgrove.models.blocks import Decoder

CHUNK = 65536  # tokens whose hidden states are held at once


def negative_log_likelihood(decoder: Decoder, windows: Sequence[Tensor]) -> tuple[float, int]:
    """−Σ log p(token | the tokens before it in its window), in nats, and the number of tokens predicted.

    The first token of a window is given, not predicted. Blocks are loaded one after the other.

    Args:
        decoder: the model.
        windows: (1, tokens) token ids each.
    """
    total, count, start = 0.0, 0, 0
    while start < len(windows):
        end, held = start, 0
        while end < len(windows) and (end == start or held + windows[end].numel() <= CHUNK):
            held += windows[end].numel()
            end += 1
        part = windows[start:end]
        calls = {}
        states = []
        for ids in part:
            hidden, call = decoder.embed(ids)
            calls[ids.shape[1]] = call
            states.append(hidden)
        for index in range(len(decoder)):
            with decoder.loaded(index) as block:
                for i, ids in enumerate(part):
                    states[i] = decoder.run(block, states[i], calls[ids.shape[1]][index])
        for ids, hidden in zip(part, states, strict=True):
            logits = decoder.logits(ids, hidden)[0, :-1].float()
            target = ids[0, 1:].to(logits.device)
            total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
            count += target.numel()
        start = end
    return total, count


def perplexity(decoder: Decoder, windows: Sequence[Tensor]) -> float:
    """exp of the mean negative log-likelihood per predicted token: stride = window length, no overlap."""
    total, count = negative_log_likelihood(decoder, windows)
    return math.exp(total / count)
