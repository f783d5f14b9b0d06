"""SparseGPT (Frantar & Alistarh, ICML 2023): prunes column by column and updates the later columns to compensate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import TypeAlias, cast

import torch
from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind
from fedgrove.models.masks import Target, lowest, lowest_of_few

NEEDS: StatisticsKind = "gram"

DAMPING = 0.01  # times the mean of the Gram matrix's diagonal; from the paper
BLOCK = 128  # columns whose mask is selected together; from the paper
TILE = 16  # columns that are updated one by one; ours, affects only speed
FACTOR_DTYPE = torch.float32  # float64 takes twice as long, and decides near-ties as exact arithmetic would

Solver: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int] | None], None]


def prune(weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Zeroes the weights of lowest saliency and updates the columns to their right to compensate.

    From the paper: with H = Σ x xᵀ (damped) and U the upper Cholesky factor of H⁻¹, pruning w_ij costs w_ij²/U_jj², and the
    optimal update of the later columns subtracts (w_ij/U_jj)·U_j,later. An unstructured mask is selected for 128 columns at a
    time over all rows; an N:M mask is selected when its group of m columns is reached.

    Ours: the same result for a third of the work, without forming H⁻¹. With H = R Rᵀ (R upper triangular), U = R⁻¹, so the
    cost is w_ij²·R_jj². When block b of columns is reached, the updates from all columns to its left are one product, where
    w − ŵ is the change of those columns: w_b + (w − ŵ)_left R_left,b (R_bb)⁻¹. Only the 128×128 diagonal blocks are inverted.
    (QuIP, Chee et al., NeurIPS 2023, also feeds errors back through the factor of H itself.) Within a block, a column is
    updated once, when it is reached, with the errors of all columns before it. The factor is float32, as in the published
    code; a mask can differ from the exact one where two costs agree to five digits. Also ours:

    - Exact counts. (The published threshold prunes one weight too many for every 128 columns, and all weights where scores
      are tied.)
    - The weights of an input that is always zero are pruned first, but those that the target leaves keep their value, so that
      the number of zeros is exactly the target.

    Args:
        weight: (out, in) float32; overwritten.
        inputs: the Gram matrix of the inputs, (in, in).
        target: how many weights are pruned; with a pattern (n, m), ``in`` must be a multiple of m.

    Returns:
        The pruned weight and its mask (True = kept), both (out, in).

    Raises:
        ValueError: the statistics hold NaN or infinity, or cannot be factored.
    """
    num_out, num_in = weight.shape
    device, dtype = weight.device, weight.dtype
    factor = inputs.cached(reversed_factor).to(dtype)
    scale = factor.diagonal().flip(0)
    cost = scale.masked_fill(inputs.squares == 0, 0.0)[:, None]
    change = torch.empty(num_in, num_out, dtype=dtype, device=device)  # w − ŵ: one row per input, the last input first
    mask = torch.empty(weight.shape, dtype=torch.bool, device=device)
    total = target.num_pruned(weight.numel())

    group = target.pattern[1] if target.pattern else 1
    block = group * max(1, BLOCK // group)
    solve = _solver(weight)
    buffers = torch.empty(4, block, num_out, dtype=dtype, device=device)  # reused: allocating takes longer than computing

    for start in range(0, num_in, block):
        end = min(start + block, num_in)
        part, before, pruned, errors = buffers[:, : end - start]
        left, here = slice(num_in - start, None), slice(num_in - end, num_in - start)
        inverse = _invert(factor[here, here].flip(0, 1).double()).to(dtype)
        update = (factor[left, here].T @ change[left]).flip(0)
        before.copy_(weight[:, start:end].contiguous().T)  # transposing a contiguous copy is thirty times faster
        torch.addmm(before, inverse.T, update, out=part)
        step = inverse * scale[start:end, None]
        if not target.pattern:
            torch.mul(part, cost[start:end], out=errors).abs_()
            pruned.copy_(lowest([errors], total * end // num_in - total * start // num_in))
        solve(part, pruned, errors, step, cost[start:end], target.pattern)
        weight[:, start:end] = part.T.contiguous()
        mask[:, start:end] = (pruned == 0).T.contiguous()
        change[here] = before.sub_(part).flip(0)
    return weight, mask


def columns(part: Tensor, pruned: Tensor, errors: Tensor, step: Tensor, cost: Tensor, pattern: tuple[int, int] | None) -> None:
    """Prunes a block column by column; the later columns of the block compensate for each column's error.

    Args:
        part: (width, out): the block's columns, already updated for all columns before the block; pruned in place.
        pruned: (width, out): 1 where a weight is pruned, else 0; with a pattern it is selected and written here.
        errors: (width, out): a buffer.
        step: (width, width): ``step[i, j]`` is what pruning a value of 1 in row i of ``part`` subtracts from row j > i.
        cost: (width, 1): the factor by which weights are multiplied before they are compared.
        pattern: (n, m), where m divides the width, or None.
    """
    width, tile = len(part), pattern[1] if pattern else TILE
    for left in range(0, width, tile):
        right = min(left + tile, width)
        if left:
            part[left:right].addmm_(step[:left, left:right].T, errors[:left], alpha=-1)
        if pattern:
            pruned[left:right] = lowest_of_few((part[left:right] * cost[left:right]).abs_(), pattern[1] - pattern[0])
        for j in range(left, right):
            if j > left:
                part[j].addmv_(errors[left:j].T, step[left:j, j], alpha=-1)
            torch.mul(part[j], pruned[j], out=errors[j])
    part -= errors


def _solver(weight: Tensor) -> Solver:
    """:func:`columns`, or on a GPU a single kernel, if Triton is installed and works."""
    if weight.is_cuda and weight.dtype == torch.float32:
        return gpu_kernel(weight.device) or columns
    return columns


@cache
def gpu_kernel(device: torch.device) -> Solver | None:
    """The kernel of :mod:`fedgrove.stages.prune.kernels` for a GPU: the same as :func:`columns`, faster.

    None if Triton is not installed, or if the kernel does not work; in the latter case one line on standard error says why.
    """
    try:
        from fedgrove.stages.prune import kernels  # imports Triton, which is not installed everywhere

        kernels.check(device, columns)
    except Exception as error:  # a compiler or a driver can raise anything; torch does the same work without them
        if not (isinstance(error, ModuleNotFoundError) and error.name == "triton"):
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"fedgrove: {device}: SparseGPT's GPU kernel does not work ({why}); using torch, slower", file=sys.stderr)
        return None
    return kernels.columns


def _invert(upper: Tensor) -> Tensor:
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return cast(Tensor, torch.linalg.solve_triangular(upper, identity, upper=True))


def reversed_factor(inputs: InputStatistics, damping: float = DAMPING) -> Tensor:
    """The lower Cholesky factor of H + λI with the inputs in reverse order: R of :func:`prune`, flipped in both dimensions.

    λ is ``damping`` times the mean of H's diagonal. The factor is computed in float32; if that fails, in float64; if that
    fails too, with ten times the damping, repeatedly. H is never replaced by the identity, which would silently turn SparseGPT
    into magnitude pruning.

    Args:
        inputs: holds the Gram matrix H, (in, in) float64, symmetric and positive semidefinite; only its upper triangle is read.

    Returns:
        (in, in) float32 or float64. No other memory of that size is needed.

    Raises:
        ValueError: the matrix holds NaN or infinity, or cannot be factored even with 10⁵ times the damping.
    """
    diagonal = inputs.squares
    if not torch.isfinite(diagonal.sum()):  # the off-diagonal entries are bounded by the diagonal
        raise ValueError("the statistics of the inputs are not finite")
    mean = diagonal.mean()
    if mean == 0:
        mean = torch.ones_like(mean)
    size, device = len(diagonal), diagonal.device
    for dtype in (FACTOR_DTYPE, *[torch.float64] * 6):
        factor = torch.empty(size, size, dtype=dtype, device=device).T  # column-major, so that LAPACK factors it in place
        for start, strip in inputs.strips():
            top = size - start - len(strip)
            factor[top : size - start, : size - start] = strip.flip(0, 1)
        factor.diagonal().copy_((torch.where(diagonal == 0, 1.0, diagonal) + mean * damping).flip(0))
        info = torch.empty((), dtype=torch.int32, device=device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if not info:
            return factor
        if dtype == torch.float64:
            damping *= 10
    raise ValueError("the Gram matrix of the inputs cannot be factored")
