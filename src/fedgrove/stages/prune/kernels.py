"""Kernels for GPUs of NVIDIA, in Triton, which comes with torch where there is one. Importing this needs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # outputs that one warp takes from the first column to the last, in its registers: nobody waits for another warp


def columns(part: Tensor, pruned: Tensor, errors: Tensor, step: Tensor, cost: Tensor, pattern: tuple[int, int] | None) -> None:
    """A block of columns of SparseGPT, one after the other, by rows.

    It does what :func:`fedgrove.stages.prune.pruners.sparsegpt.columns` does.

    Once the mask is chosen, rows do not know of each other, so each program does the whole block for a few of them. Sums are
    taken in another order than there: from a column to all later ones, as in the paper.

    Args:
        part, pruned, step, cost, pattern: as there; float32, contiguous, on one GPU.
        errors: not touched.
    """
    width, num_out = part.shape
    keep, group = pattern or (0, 0)
    _columns[(triton.cdiv(num_out, ROWS),)](
        part, pruned, step.contiguous(), cost.contiguous(), num_out, width, group - keep,
        GROUP=group, ROWS=ROWS, WIDTH=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip


def check(device: torch.device, reference: Callable[..., None]) -> None:
    """Compiles the kernel for a device, runs it, and compares it with ``reference``, which does the same in torch.

    Raises:
        RuntimeError: the numbers are not those of torch.
        Exception: whatever Triton raises where it cannot compile or run; a compiler for C may be missing, say.
    """
    random = torch.Generator().manual_seed(0)
    part, step = torch.randn(8, 24, generator=random).to(device), torch.randn(8, 8, generator=random).triu().to(device)
    step.diagonal().fill_(1.0)
    cost = torch.ones(8, 1, device=device)
    results = []
    for solve in (reference, columns):
        solved, pruned = part.clone(), torch.empty_like(part)
        solve(solved, pruned, torch.empty_like(part), step, cost, (2, 4))
        results.append((solved, pruned))
    (expected, expected_pruned), (solved, pruned) = results
    if not (torch.equal(pruned, expected_pruned) and torch.allclose(solved, expected, rtol=1e-4, atol=1e-4)):
        raise RuntimeError("it computes other numbers than torch")


@triton.jit
def _columns(part, gone, step, cost, num_out, width, num_gone, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    here = (row < num_out) & (column < width)
    place = column * num_out + row
    w = tl.load(part + place, mask=here, other=0.0)
    goes = tl.load(gone + place, mask=here, other=0.0)
    price = tl.load(cost + column, mask=column < width, other=0.0)
    for j in range(width):
        if GROUP > 0:  # noqa: SIM102 - only an `if` of its own is decided when the kernel is made, and j % 0 never asked
            if j % GROUP == 0:  # a group's mask is chosen when it is reached
                score = tl.abs(w * price)
                lower = tl.zeros_like(score)
                for k in range(j, j + GROUP):
                    other = tl.sum(tl.where(column == k, score, 0.0), axis=1)[:, None]
                    lower += ((other < score) | ((other == score) & (k < column))).to(tl.float32)
                goes = tl.where((column >= j) & (column < j + GROUP), (lower < num_gone).to(tl.float32), goes)
        error = tl.sum(tl.where(column == j, w * goes, 0.0), axis=1)[:, None]
        repair = tl.load(step + j * width + column, mask=(column > j) & (column < width), other=0.0)
        w -= error * tl.where(column == j, 1.0, repair)
    tl.store(part + place, w, mask=here)
    tl.store(gone + place, goes, mask=here)
