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
    """Zeroes weights of low saliency and lets the columns to their right make up for it.

    The paper's: with H = Σ x xᵀ (damped) and U the upper Cholesky factor of H⁻¹, removing w_ij costs w_ij²/U_jj², and the best
    repair of the later columns subtracts (w_ij/U_jj)·U_j,later. An unstructured mask is chosen for 128 columns at a time over
    all rows; an N:M mask when its group of m columns is reached.

    Ours, the same numbers for a third of the work: H⁻¹ is never formed. With H = R Rᵀ (R upper triangular) U is R⁻¹, so the
    cost is w_ij²·R_jj², and when a block b of columns is reached, all repairs by the columns to its left, w − ŵ being what
    they lost, are one product: w_b + (w − ŵ)_left R_left,b (R_bb)⁻¹. Only the 128×128 blocks on the diagonal are inverted.
    (That an error can be fed back through the factor of H itself is known from QuIP, Chee et al., NeurIPS 2023.) Also ours:

    - exact counts (the published threshold takes one weight too many for every 128 columns, and all of them where
      scores are tied);
    - an input that is always zero loses its weights first, but those that the target leaves standing keep their
      value, so that the number of zeros is the number that was asked for.

    Args:
        weight: (out, in) float32; overwritten.
        inputs: the Gram matrix of the inputs, ``gram`` (in, in).
        target: how many weights go; with a pattern (n, m), ``in`` must be a multiple of m.

    Returns:
        The pruned weight and its mask (True = kept), both (out, in).

    Raises:
        ValueError: the statistics hold NaN or infinity, or cannot be factored.
    """
    dead = inputs.gram.diagonal() == 0
    factor = upper_factor(inputs.gram)
    scale = factor.diagonal().to(weight.dtype)
    feedback = factor.to(weight.dtype)

    columns = weight.T.contiguous()  # (in, out): one input's weights lie side by side
    lost = columns.clone()  # becomes w − ŵ, block after block
    num_in, num_out = columns.shape
    kept = torch.empty(columns.shape, dtype=torch.bool, device=weight.device)
    total = target.num_pruned(weight.numel())

    group = target.pattern[1] if target.pattern else 1
    tile = group * max(1, TILE // group)
    block = tile * max(1, BLOCK // tile)

    for start in range(0, num_in, block):
        end = min(start + block, num_in)
        inverse = _invert(factor[start:end, start:end]).to(weight.dtype)
        columns[start:end].addmm_(inverse.T, feedback[:start, start:end].T @ lost[:start])
        errors = torch.empty(end - start, num_out, dtype=weight.dtype, device=weight.device)
        if not target.pattern:
            score = (columns[start:end] * scale[start:end, None]).square_()
            score[dead[start:end]] = 0
            kept[start:end] = ~lowest([score], total * end // num_in - total * start // num_in)
        for left in range(start, end, tile):
            right = min(left + tile, end)
            for j in range(left, right):
                if target.pattern and j % group == 0:
                    score = (columns[j : j + group] * scale[j : j + group, None]).square_()
                    score[dead[j : j + group]] = 0
                    kept[j : j + group] = _highest(score, target.pattern[0])
                gone = ~kept[j]
                torch.mul(columns[j], gone, out=errors[j - start]).mul_(scale[j])
                columns[j].masked_fill_(gone, 0.0)
                columns[j + 1 : right].addr_(inverse[j - start, j + 1 - start : right - start], errors[j - start], alpha=-1)
            rest = inverse[left - start : right - start, right - start :]
            columns[right:end].addmm_(rest.T, errors[left - start : right - start], alpha=-1)
        lost[start:end] -= columns[start:end]
    return columns.T.contiguous(), kept.T.contiguous()


def _highest(scores: Tensor, count: int) -> Tensor:
    """Marks the ``count`` highest of each column, ties for the later row; compares all pairs, which beats sorting a few."""
    earlier = torch.ones(len(scores), len(scores), dtype=torch.bool, device=scores.device).tril(-1)
    below = (scores[None] < scores[:, None]) | ((scores[None] == scores[:, None]) & earlier[:, :, None])
    return below.sum(1) >= len(scores) - count


def _invert(upper: Tensor) -> Tensor:
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return cast(Tensor, torch.linalg.solve_triangular(upper, identity, upper=True))


def upper_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """R, upper triangular, with H + λI = R Rᵀ: a Cholesky factorisation from the last row to the first.

    λ is ``damping`` times the mean of H's diagonal. A matrix that still cannot be factored gets ten times the damping,
    again and again; it is never replaced by the identity, which would silently turn SparseGPT into magnitude pruning.

    Args:
        gram: (in, in) float64, symmetric, not negative definite.

    Returns:
        (in, in) float64.

    Raises:
        ValueError: the matrix holds NaN or infinity, or cannot be factored even when it is all damping.
    """
    if not torch.isfinite(gram.sum()):
        raise ValueError("the statistics of the inputs are not finite")
    damped = gram.flip(0, 1)
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
            return cast(Tensor, lower.flip(0, 1))
        damping *= 10
    raise ValueError("the Gram matrix of the inputs cannot be factored")
