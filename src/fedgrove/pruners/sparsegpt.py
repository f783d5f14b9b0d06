"""SparseGPT (Frantar & Alistarh, ICML 2023): prune column by column, and let the columns to come make up for it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fedgrove.inputs import Inputs, Needs
from fedgrove.masks import Target, lowest

NEEDS: Needs = "gram"

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal; the paper's
BLOCK = 128  # columns whose mask is chosen at once; the paper's
TILE = 16  # columns that are updated one after the other; ours, it changes speed and nothing else


def prune(weight: Tensor, inputs: Inputs, target: Target) -> tuple[Tensor, Tensor]:
    """Zeroes weights of low saliency w²/U_jj² and spreads their error over the columns to their right.

    With H = Σ x xᵀ (damped) and U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), removing w_ij costs w_ij²/U_jj², and
    the best repair of the later columns subtracts (w_ij/U_jj)·U_j,later. An unstructured mask is chosen for 128 columns
    at a time over all rows; an N:M mask when its group of m columns is reached. That is the paper's. Ours:

    - exact counts (the published threshold takes one weight too many for every 128 columns, and all of them where
      scores are tied);
    - an input that is always zero loses its weights first, but those that the target leaves standing keep their
      value, so that the number of zeros is the number that was asked for;
    - the weight is worked on transposed, 16 columns at a time, with matrix products between: same numbers, faster.

    Args:
        weight: (out, in) float32; overwritten.
        inputs: the Gram matrix of the inputs, ``gram`` (in, in).
        target: how many weights go; with a pattern (n, m), ``in`` must be a multiple of m.

    Returns:
        The pruned weight and its mask (True = kept), both (out, in).
    """
    gram = inputs.gram
    dead = gram.diagonal() == 0
    factor = inverse_factor(gram).to(weight.dtype)

    columns = weight.T.contiguous()  # (in, out): one input's weights lie side by side
    num_in, num_out = columns.shape
    kept = torch.empty(columns.shape, dtype=torch.bool, device=weight.device)
    total = target.num_pruned(weight.numel())

    group = target.pattern[1] if target.pattern else 1
    tile = group * max(1, TILE // group)
    block = tile * max(1, BLOCK // tile)

    for start in range(0, num_in, block):
        end = min(start + block, num_in)
        errors = torch.empty(end - start, num_out, dtype=weight.dtype, device=weight.device)
        if not target.pattern:
            score = (columns[start:end] / factor.diagonal()[start:end, None]).square_()
            score[dead[start:end]] = 0
            count = total * end // num_in - total * start // num_in
            kept[start:end] = ~lowest([score], count)
        for left in range(start, end, tile):
            right = min(left + tile, end)
            for j in range(left, right):
                if target.pattern and j % group == 0:
                    score = (columns[j : j + group] / factor.diagonal()[j : j + group, None]).square_()
                    score[dead[j : j + group]] = 0
                    ranks = score.argsort(dim=0, stable=True)
                    keeps = torch.arange(group, device=weight.device)[:, None] >= group - target.pattern[0]
                    kept[j : j + group].scatter_(0, ranks, keeps.expand_as(ranks))
                error = errors[j - start]
                torch.mul(columns[j], ~kept[j], out=error)
                columns[j].masked_fill_(~kept[j], 0.0)
                error /= factor[j, j]
                columns[j + 1 : right].addr_(factor[j, j + 1 : right], error, alpha=-1)
            columns[right:end].addmm_(factor[left:right, right:end].T, errors[left - start : right - start], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return columns.T.contiguous(), kept.T.contiguous()


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """U, the upper Cholesky factor of the inverse of the damped Gram matrix: (H + λI)⁻¹ = UᵀU.

    λ is ``damping`` times the mean of H's diagonal. A matrix that still cannot be factored gets ten times the damping,
    again and again; it is never replaced by the identity, which would silently turn SparseGPT into magnitude pruning.

    Args:
        gram: (in, in) float64, symmetric, not negative definite.

    Returns:
        (in, in) float64, upper triangular.

    Raises:
        ValueError: the matrix holds NaN or infinity, or cannot be factored even when it is all damping.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("the statistics of the inputs are not finite")
    damped = gram.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    if mean == 0:
        mean = torch.ones_like(mean)
    added = 0.0
    for _ in range(6):
        diagonal += mean * (damping - added)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower  # at 11008 inputs each of these matrices is a gigabyte
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return cast(Tensor, upper)
        damping *= 10
    raise ValueError("the Gram matrix of the inputs cannot be factored")
