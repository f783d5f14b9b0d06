"""A random subspace of soft prompts: p = p₀ + scale · A z, in which z has few numbers.

A's entries are random signs by seed (:mod:`fedgrove.models.signs`), so that every client makes the same A, whatever its
versions of libraries. The released FedBPT draws a Gaussian A with the global generator of torch after the model was loaded. p₀
are the embeddings of some tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedgrove.models.signs import key_of, signs

CHUNK = 2**20  # entries of A in memory at once


def soft_prompts(points: Tensor, base: Tensor, scale: float, seed: str) -> Tensor:
    """The soft prompts of points of the subspace.

    Args:
        points: (prompts, dimension).
        base: (tokens, width), p₀.
        scale: of A's signs.
        seed: of the stage.

    Returns:
        (prompts, tokens, width) float32.
    """
    dimension, entries = points.shape[1], base.numel()
    moved = [points.double() @ part.T for part in _rows(entries, dimension, seed)]
    return (base.double().flatten() + scale * torch.cat(moved, 1)).float().view(len(points), *base.shape)


def scale_of(spread: float, embeddings: Tensor, dimension: int) -> float:
    """The scale at which entries of A z, for a standard normal z, have ``spread`` times the deviation of the embeddings."""
    return spread * float(embeddings.double().std()) / math.sqrt(dimension)


def _rows(entries: int, dimension: int, seed: str) -> Iterator[Tensor]:
    """A in parts, (rows, dimension) float64."""
    key, each = key_of(seed, "subspace"), max(1, CHUNK // dimension)
    for start in range(0, entries, each):
        count = min(each, entries - start)
        yield torch.stack([signs(key, column, start, count) for column in range(dimension)], 1).double()
