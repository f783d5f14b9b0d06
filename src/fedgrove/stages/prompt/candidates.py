"""Lists of token ids as a tensor: int32 with −1 behind those that are shorter than others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORDS = "words"  # a tensor of a request: the token ids of every word of a list


def as_ids(prompts: Sequence[Sequence[int]]) -> Tensor:
    """Token ids, (prompts, tokens) int32 with −1 behind shorter ones."""
    longest = max(map(len, prompts))
    return torch.tensor([[*prompt, *[-1] * (longest - len(prompt))] for prompt in prompts], dtype=torch.int32)


def as_words(ids: Tensor) -> tuple[tuple[int, ...], ...]:
    """The lists of :func:`as_ids`."""
    return tuple(tuple(row[row >= 0].tolist()) for row in ids)


def are_ids(ids: Tensor | None, vocabulary: int) -> bool:
    """Whether a tensor, which came from a network, is what :func:`as_ids` makes of token ids below ``vocabulary``."""
    if ids is None or ids.dtype != torch.int32 or ids.dim() != 2:
        return False
    kept = ids >= 0
    return bool(((ids >= -1) & (ids < vocabulary)).all()) and bool((kept[:, :-1] >= kept[:, 1:]).all())
