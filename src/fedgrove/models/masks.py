"""Masks: which weights are pruned, with exact counts, and with ties that are broken the same way on every machine.

Everywhere in fedgrove a mask is a bool tensor with the shape of its weight, and True means kept.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SORTED_AT_ONCE = 2**20  # entries; sorting takes eight times the memory of its input
FEW = 16  # entries; up to this number, comparing all pairs is faster than sorting


@dataclass(frozen=True)
class Target:
    """The target sparsity of a weight.

    Args:
        sparsity: the fraction of the entries to prune, 0 ≤ sparsity < 1.
        pattern: ``(n, m)``: of every m consecutive inputs of an output row, n are kept; then ``sparsity`` is 1 − n/m.
    """

    sparsity: float
    pattern: tuple[int, int] | None = None

    @classmethod
    def of(cls, sparsity: float | None, pattern: tuple[int, int] | None) -> Target:
        """From the two keys of a job, of which exactly one is given."""
        if pattern is not None:
            return cls(1.0 - pattern[0] / pattern[1], pattern)
        assert sparsity is not None
        return cls(sparsity)

    def num_pruned(self, numel: int) -> int:
        """How many of ``numel`` entries are pruned: the nearest integer, halves rounded up."""
        return math.floor(self.sparsity * numel + 0.5)

    def __str__(self) -> str:
        return f"{self.pattern[0]}:{self.pattern[1]}" if self.pattern else f"{self.sparsity:g}"


def lowest(keys: Sequence[Tensor], count: int) -> Tensor:
    """Marks exactly ``count`` entries: the lowest by the first key, ties by the next key, then by position.

    Takes linear time, with one threshold per key instead of sorting. Keys must not contain NaN.

    Args:
        keys: tensors of one shape, the most important first.
        count: how many entries to mark, 0 ≤ count ≤ numel.

    Returns:
        A bool tensor of that shape, True for the marked entries.
    """
    shape = keys[0].shape
    flat = [key.reshape(-1) for key in keys]
    marked = torch.zeros(flat[0].numel(), dtype=torch.bool, device=flat[0].device)
    candidates: Tensor | None = None  # positions that are still tied; None: all
    for key in flat:
        if count == 0:
            break
        values = key if candidates is None else key[candidates]
        if count == values.numel():
            break
        threshold = _kth_lowest(values, count)
        below, tied = values <= threshold, None
        if int(below.count_nonzero()) > count:
            below, tied = values < threshold, (values == threshold).nonzero().squeeze(1)
        if candidates is None:
            marked = below
        else:
            marked[candidates[below]] = True
        if tied is None:
            return marked.view(shape)
        count -= int(below.count_nonzero())
        candidates = tied if candidates is None else candidates[tied]
    if candidates is None:
        marked[:count] = True
    else:
        marked[candidates[:count]] = True
    return marked.view(shape)


def lowest_of_few(key: Tensor, count: int | Tensor) -> Tensor:
    """:func:`lowest` in every column by a single key, for short columns: compares all pairs of entries.

    Args:
        key: (entries, columns).
        count: how many entries of each column to mark; one number, or (columns,).

    Returns:
        (entries, columns) bool.
    """
    dtype = torch.uint8 if len(key) <= 256 else torch.int16
    lower = torch.zeros(key.shape, dtype=dtype, device=key.device)  # how many entries of the column are lower
    for i in range(len(key)):
        for j in range(i + 1, len(key)):
            first_lower = key[i] <= key[j]
            lower[j] += first_lower
            lower[i] += ~first_lower
    return lower < count


def _lowest_of_rows(key: Tensor, counts: Tensor) -> Tensor:
    """:func:`lowest` in every row by a single key, on a CPU: key is (rows, width), counts is (rows,)."""
    marked = torch.zeros(key.shape, dtype=torch.bool)
    for count in sorted(set(counts.tolist())):
        if count:
            rows = (counts == count).nonzero().squeeze(1)
            values = key[rows]
            threshold = torch.from_numpy(np.partition(values.numpy(), count - 1, axis=1)[:, count - 1, None])
            selected = values <= threshold
            many = (
                (selected.count_nonzero(1) > count).nonzero().squeeze(1)
            )  # with ties at the threshold: mark the first of them
            tied = values[many] == threshold[many]
            below = selected[many] & ~tied
            selected[many] = below | (tied & (tied.cumsum(1) <= count - below.sum(1, keepdim=True)))
            marked[rows] = selected
    return marked


def _kth_lowest(values: Tensor, k: int) -> Tensor | float:
    """The k-th lowest value. On a CPU by NumPy, whose vectorized selection is several times faster than torch's; on a GPU by
    sorting, because ``kthvalue`` keeps only one of its multiprocessors busy."""
    if values.device.type != "cpu":
        return values.sort().values[k - 1]
    numbers = values.numpy()
    return float(np.partition(numbers, k - 1)[k - 1])


def keep(keys: Sequence[Tensor], target: Target) -> Tensor:
    """The mask that keeps the highest entries of the matrix, or of every group of an N:M pattern.

    Args:
        keys: tensors of one shape (out, in), the most important first, as in :func:`lowest` and :func:`keep_highest`.

    Returns:
        (out, in) bool, True = kept; exactly ``target.num_pruned(numel)`` are False.
    """
    return keep_highest(keys, target) if target.pattern else ~lowest(keys, target.num_pruned(keys[0].numel()))


def split_evenly(total: int, parts: int) -> list[int]:
    """Splits ``total`` into ``parts`` integers that differ by at most one, in a fixed order."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def quotas(zeros: Sequence[int], total: int) -> list[int]:
    """How many entries of each row are pruned, as evenly as possible, if some are zero already: ``total`` in all.

    No other entry is pruned where zeros are enough: as long as there are fewer zeros than ``total``, every row loses at least
    its zeros, else at most them. So a matrix that has the wanted number of zeros keeps them, in whichever rows they are.

    Args:
        zeros: of each row.
    """
    even = split_evenly(total, len(zeros))
    few = sum(zeros) <= total
    if all(zero <= share for zero, share in zip(zeros, even, strict=True)) and few:
        return even
    bound = max if few else min
    level = bisect.bisect_right(range(total + 1), total, key=lambda level: sum(bound(zero, level) for zero in zeros)) - 1
    counts = [bound(zero, level) for zero in zeros]
    open_ = [row for row, zero in enumerate(zeros) if (zero <= level if few else zero > level)]
    for row, more in zip(open_, split_evenly(total - sum(counts), len(open_)) if open_ else (), strict=True):
        counts[row] += more
    return counts


def keep_highest(keys: Sequence[Tensor], target: Target, zeros: Tensor | None = None) -> Tensor:
    """The mask that keeps the highest entries of every output row, or of every group of an N:M pattern.

    The number of pruned entries differs by at most one between rows, so that exactly ``target.num_pruned(numel)`` entries are
    pruned in total. (The published Wanda rounds down in every row, and so misses the target.)

    Args:
        keys: tensors of one shape (out, in), the most important first; ties by the next key, then the later input is kept.
        target: with a pattern (n, m), ``in`` must be a multiple of m.
        zeros: (out, in) bool, the entries that are zero already, whose keys are the lowest: they are pruned before any other,
            see :func:`quotas`; None: there are none. Without effect on an N:M pattern.

    Returns:
        (out, in) bool, True = kept.
    """
    num_out, num_in = keys[0].shape
    device = keys[0].device
    if target.pattern:
        n, m = target.pattern
        rows, width, pruned = num_out * num_in // m, m, torch.full((num_out * num_in // m,), m - n, device=device)
    else:
        total = target.num_pruned(num_out * num_in)
        counts = split_evenly(total, num_out) if zeros is None else quotas(zeros.sum(1).cpu().tolist(), total)
        rows, width, pruned = num_out, num_in, torch.tensor(counts, device=device)
    ranks = torch.arange(width, device=device)
    mask = torch.empty(rows, width, dtype=torch.bool, device=device)
    at_once = max(1, SORTED_AT_ONCE // width)
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        if len(keys) == 1 and width <= FEW:
            mask[part] = ~lowest_of_few(keys[0].reshape(rows, width)[part].T.contiguous(), pruned[part]).T
            continue
        if len(keys) == 1 and device.type == "cpu":
            mask[part] = ~_lowest_of_rows(keys[0].reshape(rows, width)[part], pruned[part])
            continue
        order = ranks.expand(mask[part].shape)
        for key in reversed(keys):
            order = order.gather(1, key.reshape(rows, width)[part].gather(1, order).argsort(dim=1, stable=True))
        mask[part].scatter_(1, order, ranks >= pruned[part, None])
    return mask.view(num_out, num_in)
