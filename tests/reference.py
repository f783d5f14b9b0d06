"""SparseGPT, Wanda and DSnoT written out as they were published: the oracle of the tests, slow and plain on purpose.

Both work on float32 copies and return ``(weight, mask)``, True = kept. They keep the published thresholds, which miss the
target: SparseGPT prunes ``score <= sorted(score)[int(n·s)]`` and so one weight too many in every block of 128 columns,
and Wanda rounds ``int(in·s)`` down in every row. ``exact=True`` changes the counts and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float = 0.0,
    pattern: tuple[int, int] | None = None,
    *,
    exact: bool = False,
    factor: torch.dtype = torch.float32,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """One column after the other. ``pattern`` is (kept, of); ``factor`` is the dtype of the Cholesky factors."""
    w = weight.clone().float()
    rows, columns = w.shape
    h = gram.clone().to(factor)
    dead = torch.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * torch.mean(torch.diag(h)) * torch.eye(columns, dtype=factor)
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(h, upper=True).float()
    pruned = torch.zeros(rows, columns, dtype=torch.bool)
    total = int(sparsity * rows * columns + 0.5)

    for i1 in range(0, columns, block):
        i2 = min(i1 + block, columns)
        w1, u1 = w[:, i1:i2].clone(), u[i1:i2, i1:i2]
        q1, e1 = torch.zeros_like(w1), torch.zeros_like(w1)
        m1 = torch.zeros_like(w1, dtype=torch.bool)
        if pattern is None:
            score = w1**2 / torch.diag(u1).reshape(1, -1) ** 2
            if exact:
                count = total * i2 // columns - total * i1 // columns
                lowest = score.T.flatten().argsort(stable=True)[:count]  # ties: first input, then first output
                m1 = torch.zeros(score.numel(), dtype=torch.bool).index_fill(0, lowest, True).view(i2 - i1, rows).T
            else:
                threshold = torch.sort(score.flatten())[0][int(score.numel() * sparsity)]
                m1 = score <= threshold
        for i in range(i2 - i1):
            if pattern is not None and i % pattern[1] == 0:
                n, m = pattern[1] - pattern[0], pattern[1]
                score = w1[:, i : i + m] ** 2 / torch.diag(u1)[i : i + m].reshape(1, -1) ** 2
                m1.scatter_(1, i + score.argsort(dim=1, stable=True)[:, :n], True)
            column, d = w1[:, i], u1[i, i]
            q = column.clone()
            q[m1[:, i]] = 0
            error = (column - q) / d
            w1[:, i:] -= error.unsqueeze(1) @ u1[i, i:].unsqueeze(0)
            q1[:, i], e1[:, i] = q, error
        w[:, i1:i2] = q1
        pruned[:, i1:i2] = m1
        w[:, i2:] -= e1 @ u[i1:i2, i2:]
    return w, ~pruned


def wanda(
    weight: Tensor, squares: Tensor, sparsity: float = 0.0, pattern: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Row by row the lowest |w|·‖x‖, ``int(in·sparsity)`` of them; or the lowest of every group."""
    w = weight.clone().float()
    columns = w.shape[1]
    score = w.abs() * squares.float().sqrt().reshape(1, -1)
    pruned = torch.zeros_like(w, dtype=torch.bool)
    if pattern is None:
        order = torch.sort(score, dim=-1, stable=True)[1][:, : int(columns * sparsity)]
        pruned.scatter_(1, order, True)
    else:
        n, m = pattern[1] - pattern[0], pattern[1]
        for i in range(0, columns, m):
            pruned.scatter_(1, i + score[:, i : i + m].sort(dim=1, stable=True)[1][:, :n], True)
    w[pruned] = 0
    return w, ~pruned


def dsnot(weight: Tensor, windows: Tensor, mask: Tensor, group: int | None = None, swaps: int = 50) -> Tensor:
    """DSnoT row by row, from the activations (windows, tokens, in) themselves: the mended mask.

    Ours, as in the pruner: E[x] over tokens, and a row ends with the first swap after which |ε| is not smaller, or the squared
    error with what it adds to the variance of the output counted four times.
    """
    mean = windows.double().mean((0, 1)).tolist()
    variance = windows.double().var(1, correction=0).mean(0).tolist()
    norm = windows.double().square().sum((0, 1)).sqrt().float().tolist()
    result = mask.clone()
    for i, row in enumerate(weight.tolist()):
        effect = [w * m for w, m in zip(row, mean, strict=True)]
        kept = {j for j in range(len(row)) if mask[i, j]}
        pruned = set(range(len(row))) - kept
        cost = {j: float(abs(torch.tensor(row[j])) * torch.tensor(norm[j])) for j in range(len(row))}
        error = sum(effect[j] for j in sorted(pruned))
        touched: set[int] = set()
        for _ in range(swaps):
            sign = 1 if error > 0 else -1
            helps = [j for j in pruned - touched if effect[j] * sign > 0]
            if not helps:
                break
            back = max(helps, key=lambda j: (effect[j] * sign / variance[j], -j))
            if group:
                out = [j for j in kept - touched if j // group == back // group]
            else:
                out = [j for j in kept - touched if effect[j] * sign < 0]
            if not out:
                break
            gone = min(out, key=lambda j: (cost[j], j))
            after = error - effect[back] + effect[gone]
            added = 4 * row[gone] ** 2 * variance[gone] - row[back] ** 2 * variance[back]
            if abs(after) >= abs(error) or after**2 + added >= error**2:
                break
            result[i, back], result[i, gone] = True, False
            touched |= {back, gone}
            pruned, kept, error = pruned - {back}, kept - {gone}, after
    return result
