"""DSnoT (Zhang et al., ICLR 2024, "Dynamic Sparse No Training"): improves a mask by swaps; no weight gets a third value."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.masks import Target

MAX_SWAPS = 50  # per row; from the paper
MARGIN = 4.0  # how many times over a swap has to earn the variance that it adds to the error
ENTRIES_AT_ONCE = 2**20  # sorted together; rows are independent


def mend(before: Tensor, after: Tensor, mask: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Swaps pruned and kept weights within each row to restore the row's expected output.

    From the paper: pruning a row changes its expected output by ε = Σ_pruned w_ij·E[x_j]. Each swap restores the pruned weight
    that reduces |ε| and has the largest |w_ij·E[x_j]| / Var[x_j], and prunes the kept weight with the lowest Wanda score among
    those whose removal reduces |ε| as well; with an N:M pattern, the kept weight with the lowest score in the same group. The
    variance is the mean of the windows' variances, as in the published code.

    Ours: E[x_j] is the mean over tokens (the published code takes the sum over a window, on which its threshold of 0.1 then
    depends), and instead of using a threshold, a row stops at the first swap that does not pay: |ε| has to fall, and the
    squared error with it. That is ε² + Σ_pruned w_ij²·Var[x_j] if channels are independent. They are not, so what a swap adds
    to the sum counts :data:`MARGIN` times, and what it takes from it once. The paper looks at |ε| only: in rows of which
    little is left, 50 swaps then prune weights that matter more than the mean does.

    Swaps preserve the number of kept weights in a row and in a group, and no weight is swapped twice. The mask may be
    anybody's, and kept weights may have changed, as SparseGPT's and the clients' means have: then ε = Σ (w_ij − ŵ_ij)·E[x_j]
    over the whole row, a restored weight gets its value from before the pruning, and a pruned one loses its present value.

    Args:
        before: (out, in) float32, the weight before it was pruned.
        after: (out, in) float32, the pruned weight, zero where the mask is False.
        mask: (out, in) bool, True = kept; overwritten.
        inputs: the ``squares``, ``means`` and ``variances`` of the input channels, (in,) each.
        target: gives the pattern; the counts are those of the mask.

    Returns:
        The mended weight and its mask.

    Raises:
        ValueError: the statistics hold NaN or infinity.
    """
    if inputs.silent:
        return after, mask
    if not torch.isfinite(inputs.total).all():  # type: ignore[arg-type]
        raise ValueError("the statistics of the inputs are not finite")
    value = torch.where(mask, after, before)  # of each weight if it is kept
    norms = inputs.squares.sqrt().to(before.dtype)
    precision = 1 / inputs.variances.clamp(min=1e-12 * float(inputs.variances.max()) or 1.0)
    rows = max(1, ENTRIES_AT_ONCE // before.shape[1])
    for start in range(0, len(before), rows):
        part = slice(start, start + rows)
        effect = value[part].double() * inputs.means
        error = ((before[part].double() - after[part].double()) * inputs.means).sum(1)
        group = target.pattern[1] if target.pattern else None
        spread = value[part].double().square() * inputs.variances
        _swap(mask[part], error, effect, spread, effect * precision, value[part].abs() * norms, group)
    return value.masked_fill_(~mask, 0.0), mask


def _swap(mask: Tensor, error: Tensor, effect: Tensor, spread: Tensor, gain: Tensor, score: Tensor, group: int | None) -> None:
    """Improves a mask in place.

    Args:
        mask: (rows, in), True = kept.
        error: (rows,), ε of each row.
        effect: (rows, in), what each weight contributes to the expected output of its row.
        spread: (rows, in), what each weight contributes to the variance of the output if channels are independent.
        gain: (rows, in), ``effect`` over the variance of the input: pruned weights are ranked by it.
        score: (rows, in), Wanda's score.
        group: M of an N:M pattern, or None.
    """
    infinity = float("inf")
    pruned, keep = ~mask, mask.clone()
    # By sign of ε: pruned weights whose return reduces |ε|, best first; kept ones whose removal does, lowest score first.
    restorable, removable = [], []
    for sign in (-1, 1):
        restorable.append(
            (gain * sign).masked_fill(~pruned | (effect * sign <= 0), -infinity).sort(dim=1, descending=True, stable=True)
        )
        removable.append(score.masked_fill(~keep | (effect * sign >= 0), infinity).sort(dim=1, stable=True))
    restored = error.new_zeros(2, len(error), dtype=torch.int64)  # how many of each list are used up
    removed = error.new_zeros(2, len(error), dtype=torch.int64)
    row = torch.arange(len(error), device=error.device)
    active = torch.ones(len(error), dtype=torch.bool, device=error.device)
    last = mask.shape[1] - 1
    for _ in range(MAX_SWAPS):
        side = (error > 0).long()
        i = restored[side, row].clamp(max=last)
        restore = torch.where(side == 1, restorable[1].indices[row, i], restorable[0].indices[row, i])
        possible = torch.where(side == 1, restorable[1].values[row, i], restorable[0].values[row, i]) > -infinity
        if group is None:
            j = removed[side, row].clamp(max=last)
            remove = torch.where(side == 1, removable[1].indices[row, j], removable[0].indices[row, j])
            possible &= torch.where(side == 1, removable[1].values[row, j], removable[0].values[row, j]) < infinity
        else:
            first = restore // group * group
            members = first[:, None] + torch.arange(group, device=first.device)
            costs = score.gather(1, members).masked_fill(~keep.gather(1, members), infinity)
            remove = first + costs.argmin(1)
            possible &= costs.amin(1) < infinity
        after = error - effect[row, restore] + effect[row, remove]
        cost = MARGIN * spread[row, remove] - spread[row, restore]
        active &= possible & (after.abs() < error.abs()) & (after.square() + cost < error.square())
        if not active.any():
            return
        rows = row[active]
        mask[rows, restore[active]], mask[rows, remove[active]] = True, False
        keep[rows, remove[active]] = False  # a restored weight is not in it either, so no weight is swapped twice
        error = torch.where(active, after, error)
        restored[side[active], rows] += 1
        removed[side[active], rows] += 1
