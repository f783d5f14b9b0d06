"""SparseGPT's solver alone, compared with the published column loop: same weight, same Gram matrix, same threads.

    .venv/bin/python bench/solver.py --write

Times include the factorization. Runs alternate, so that a busy machine slows both; the table shows medians. On a GPU:
``bench/gpu.sh``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import page
import torch
from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.masks import Target
from fedgrove.stages.prune.pruners import sparsegpt

T = TypeVar("T")
SHAPES = ["1024x1024", "4096x4096", "4096x11008"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shapes", nargs="+", default=SHAPES, help="out x in")
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    rows = ["| out × in | target | published loop, s | fedgrove, s | ratio | masks that differ |", "|---|---|---|---|---|---|"]
    for shape in given.shapes:
        num_out, num_in = map(int, shape.split("x"))
        weight, inputs = made_up(num_out, num_in, "cpu")
        for target in (Target(0.5), Target.of(None, (2, 4))):
            theirs, ours = [], []
            for _ in range(given.runs):
                seconds, expected = clock(lambda: published(weight, inputs.gram, target), "cpu")  # noqa: B023
                theirs.append(seconds)
                anew = InputStatistics("gram", inputs.tokens, inputs.gram)  # a factor that was cached would not be timed
                seconds, (_, mask) = clock(lambda: sparsegpt.prune(weight.clone(), anew, target), "cpu")  # noqa: B023
                ours.append(seconds)
            differ = float((mask != (expected != 0)).double().mean())
            slow, fast = statistics.median(theirs), statistics.median(ours)
            times = f"{slow:.2f} | {fast:.2f} | {slow / fast:.1f}"
            rows.append(f"| {num_out} × {num_in} | {target} | {times} | {differ:.1e} |")
            print(rows[-1], flush=True)
    if given.write:
        page.write("solver", "\n".join(rows))


def made_up(num_out: int, num_in: int, device: str) -> tuple[Tensor, InputStatistics]:
    """A weight, and the Gram matrix of inputs whose channels differ in size and are correlated."""
    rng = torch.Generator().manual_seed(0)
    inputs = InputStatistics("gram")
    size = torch.randn(num_in, generator=rng).exp()
    blend = torch.randn(num_in // 8, num_in, generator=rng) / 8
    for _ in range(8):
        x = torch.randn(num_in // 4, num_in, generator=rng) + torch.randn(num_in // 4, num_in // 8, generator=rng) @ blend
        inputs.add((x * size).to(device))
    return (torch.randn(num_out, num_in, generator=rng) * 0.02).to(device), inputs


def published(weight: Tensor, gram: Tensor, target: Target, damping: float = 0.01, block: int = 128) -> Tensor:
    """SparseGPT as published, written after the paper: float32, three factorizations, column by column."""
    w = weight.clone()
    h = gram.float()
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        part = w[:, start:end].clone()
        pruned = torch.zeros_like(part)
        errors = torch.zeros_like(part)
        u = inverse[start:end, start:end]
        mask = torch.zeros_like(part, dtype=torch.bool)
        if not target.pattern:
            score = part**2 / u.diagonal() ** 2
            mask = score <= score.flatten().sort().values[int(score.numel() * target.sparsity)]
        for j in range(end - start):
            if target.pattern and j % target.pattern[1] == 0:
                n, m = target.pattern
                score = part[:, j : j + m] ** 2 / u.diagonal()[j : j + m] ** 2
                mask.scatter_(1, j + score.topk(m - n, dim=1, largest=False).indices, True)
            kept = part[:, j].clone()
            kept[mask[:, j]] = 0
            pruned[:, j] = kept
            errors[:, j] = (part[:, j] - kept) / u[j, j]
            part[:, j:] -= errors[:, j, None] @ u[None, j, j:]
        w[:, start:end] = pruned
        w[:, end:] -= errors @ inverse[start:end, end:]
    return w


def clock(work: Callable[[], T], device: str) -> tuple[float, T]:
    """Seconds and result."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
