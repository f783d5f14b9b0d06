"""Triton kernels for NVIDIA GPUs. Importing this module requires Triton, which comes with torch on machines with such a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # output rows of one program: a single warp holds them in registers for all columns, so no warp waits for another


def columns(part: Tensor, pruned: Tensor, errors: Tensor, step: Tensor, cost: Tensor, pattern: tuple[int, int] | None) -> None:
    """Prunes a block column by column, like :func:`fedgrove.stages.prune.pruners.sparsegpt.columns`, in one kernel.

    An unstructured mask is already selected, and an N:M mask is selected within each output row. So output rows are
    independent, and each program prunes the whole block for a few of them. The order of the additions differs from the torch
    version: each column updates all later columns at once, as in the paper.

    Args:
        part, pruned, step, cost, pattern: see there; float32 on one GPU, ``part`` and ``pruned`` contiguous.
        errors: not used.
    """
    width, num_out = part.shape
    keep, group = pattern or (0, 0)
    _columns[(triton.cdiv(num_out, ROWS),)](
        part, pruned, step.contiguous(), cost.contiguous(), num_out, width, group - keep,
        GROUP=group, ROWS=ROWS, WIDTH=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip


def check(device: torch.device, reference: Callable[..., None]) -> None:
    """Compiles the kernel for a device, runs it on a small example, and compares the result with ``reference`` in torch.

    Raises:
        RuntimeError: the results differ.
        Exception: whatever Triton raises if it cannot compile or run the kernel, for example without a C compiler.
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
        raise RuntimeError("its results differ from those of torch")


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
        if GROUP > 0:  # noqa: SIM102 - a separate `if` is decided at compile time, so that j % 0 is never computed
            if j % GROUP == 0:  # a group's mask is selected when its first column is reached
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
