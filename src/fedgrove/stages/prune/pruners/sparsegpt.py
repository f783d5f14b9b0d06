"""SparseGPT (Frantar & Alistarh, ICML 2023): prune column by column, and let the columns to come make up for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import TypeAlias, cast

import torch
from torch import Tensor

from fedgrove.models.masks import Target, lowest, lowest_of_few
from fedgrove.stages.prune.input_statistics import InputStatistics, Needs

NEEDS: Needs = "gram"

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal; the paper's
BLOCK = 128  # columns whose mask is chosen at once; the paper's
TILE = 16  # columns that are updated one after the other; ours, it changes speed and nothing else
FACTOR = torch.float32  # the factorisation's; float64 takes twice as long and decides near-ties as the mathematics would

Solver: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int] | None], None]


def prune(weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Zeroes weights of low saliency and lets the columns to their right make up for it.

    The paper's: with H = Σ x xᵀ (damped) and U the upper Cholesky factor of H⁻¹, removing w_ij costs w_ij²/U_jj², and the best
    repair of the later columns subtracts (w_ij/U_jj)·U_j,later. An unstructured mask is chosen for 128 columns at a time over
    all rows; an N:M mask when its group of m columns is reached.

    Ours, the same numbers for a third of the work: H⁻¹ is never formed. With H = R Rᵀ (R upper triangular) U is R⁻¹, so the
    cost is w_ij²·R_jj², and when a block b of columns is reached, all repairs by the columns to its left, w − ŵ being what
    they lost, are one product: w_b + (w − ŵ)_left R_left,b (R_bb)⁻¹. Only the 128×128 blocks on the diagonal are inverted.
    (That an error can be fed back through the factor of H itself is known from QuIP, Chee et al., NeurIPS 2023.) Inside a
    block a column is repaired once, when it is reached, by all that went before it. The factor is float32, as the published
    one's are; a mask can differ from one that is computed exactly where two costs agree to five digits. Also ours:

    - exact counts (the published threshold takes one weight too many for every 128 columns, and all of them where
      scores are tied);
    - an input that is always zero loses its weights first, but those that the target leaves standing keep their
      value, so that the number of zeros is the number that was asked for.

    Args:
        weight: (out, in) float32; overwritten.
        inputs: the Gram matrix of the inputs, (in, in).
        target: how many weights go; with a pattern (n, m), ``in`` must be a multiple of m.

    Returns:
        The pruned weight and its mask (True = kept), both (out, in).

    Raises:
        ValueError: the statistics hold NaN or infinity, or cannot be factored.
    """
    num_out, num_in = weight.shape
    device, dtype = weight.device, weight.dtype
    backwards = inputs.once(reversed_factor).to(dtype)
    scale = backwards.diagonal().flip(0)
    cost = scale.masked_fill(inputs.squares == 0, 0.0)[:, None]
    lost = torch.empty(num_in, num_out, dtype=dtype, device=device)  # w − ŵ: a row for each input, the last input first
    mask = torch.empty(weight.shape, dtype=torch.bool, device=device)
    total = target.num_pruned(weight.numel())

    group = target.pattern[1] if target.pattern else 1
    block = group * max(1, BLOCK // group)
    solve = _solver(weight)
    buffers = torch.empty(4, block, num_out, dtype=dtype, device=device)  # touching new memory takes longer than the work

    for start in range(0, num_in, block):
        end = min(start + block, num_in)
        part, before, gone, errors = buffers[:, : end - start]
        left_of, here = slice(num_in - start, None), slice(num_in - end, num_in - start)
        inverse = _invert(backwards[here, here].flip(0, 1).double()).to(dtype)
        repair = (backwards[left_of, here].T @ lost[left_of]).flip(0)
        before.copy_(weight[:, start:end].contiguous().T)  # a whole matrix is turned thirty times faster than a part of one
        torch.addmm(before, inverse.T, repair, out=part)
        step = inverse * scale[start:end, None]
        if not target.pattern:
            torch.mul(part, cost[start:end], out=errors).abs_()
            gone.copy_(lowest([errors], total * end // num_in - total * start // num_in))
        solve(part, gone, errors, step, cost[start:end], target.pattern)
        weight[:, start:end] = part.T.contiguous()
        mask[:, start:end] = (gone == 0).T.contiguous()
        lost[here] = before.sub_(part).flip(0)
    return weight, mask


def columns(part: Tensor, gone: Tensor, errors: Tensor, step: Tensor, cost: Tensor, pattern: tuple[int, int] | None) -> None:
    """Goes through a block of columns, one after the other: what is removed from one is made up for by the later ones.

    Args:
        part: (width, out): the block's columns, repaired by all that went before it; pruned in place.
        gone: (width, out): 1 where a weight goes, else 0; with a pattern it is chosen here and put there.
        errors: (width, out): room to work in.
        step: (width, width): what removing 1 in a row of ``part`` subtracts from a later one, right of the diagonal.
        cost: (width, 1): what a weight is multiplied by to compare it.
        pattern: (n, m), a divisor of the width, or None.
    """
    width, tile = len(part), pattern[1] if pattern else TILE
    for left in range(0, width, tile):
        right = min(left + tile, width)
        if left:
            part[left:right].addmm_(step[:left, left:right].T, errors[:left], alpha=-1)
        if pattern:
            gone[left:right] = lowest_of_few((part[left:right] * cost[left:right]).abs_(), pattern[1] - pattern[0])
        for j in range(left, right):
            if j > left:
                part[j].addmv_(errors[left:j].T, step[left:j, j], alpha=-1)
            torch.mul(part[j], gone[j], out=errors[j])
    part -= errors


def _solver(weight: Tensor) -> Solver:
    """:func:`columns`, on a GPU in one kernel where Triton is installed and works."""
    if weight.is_cuda and weight.dtype == torch.float32:
        return gpu_kernel(weight.device) or columns
    return columns


@cache
def gpu_kernel(device: torch.device) -> Solver | None:
    """The kernel of :mod:`fedgrove.stages.prune.kernels` for a GPU, which does what :func:`columns` does, faster.

    None where Triton is not installed, or where the kernel does not work: then a line on standard error says why, once.
    """
    try:
        from fedgrove.stages.prune import kernels  # imports Triton, which is not installed everywhere

        kernels.check(device, columns)
    except Exception as error:  # whatever a compiler or a driver can do; torch does the same work without them
        if not (isinstance(error, ModuleNotFoundError) and error.name == "triton"):
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"fedgrove: {device}: SparseGPT's kernel does not work ({why}); torch does its work, slower", file=sys.stderr)
        return None
    return kernels.columns


def _invert(upper: Tensor) -> Tensor:
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return cast(Tensor, torch.linalg.solve_triangular(upper, identity, upper=True))


def reversed_factor(inputs: InputStatistics, damping: float = DAMPING) -> Tensor:
    """The lower Cholesky factor of H + λI with its inputs in reverse order: R of :func:`prune`, flipped in both directions.

    λ is ``damping`` times the mean of H's diagonal. It is computed in float32; what that cannot factor is tried in float64.
    A matrix that still cannot be factored gets ten times the damping, again and again; it is never replaced by the identity,
    which would silently turn SparseGPT into magnitude pruning.

    Args:
        inputs: their Gram matrix, (in, in) float64, symmetric, not negative definite; right of its diagonal alone it is read.

    Returns:
        (in, in) float32 or float64. Memory: nothing besides.

    Raises:
        ValueError: the matrix holds NaN or infinity, or cannot be factored even when it is all damping.
    """
    diagonal = inputs.squares
    if not torch.isfinite(diagonal.sum()):  # no product is larger than the squares of its two inputs
        raise ValueError("the statistics of the inputs are not finite")
    mean = diagonal.mean()
    if mean == 0:
        mean = torch.ones_like(mean)
    size, device = len(diagonal), diagonal.device
    for dtype in (FACTOR, *[torch.float64] * 6):
        damped = torch.empty(size, size, dtype=dtype, device=device).T  # as LAPACK wants it: factored where it lies
        for start, strip in inputs.strips():
            left = size - start - len(strip)
            damped[left : size - start, : size - start] = strip.flip(0, 1)
        damped.diagonal().copy_((torch.where(diagonal == 0, 1.0, diagonal) + mean * damping).flip(0))
        failed = torch.empty((), dtype=torch.int32, device=device)
        torch.linalg.cholesky_ex(damped, out=(damped, failed))
        if not failed:
            return damped
        if dtype == torch.float64:
            damping *= 10
    raise ValueError("the Gram matrix of the inputs cannot be factored")
