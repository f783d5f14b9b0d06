"""DSnoT (Zhang et al., ICLR 2024, "Dynamic Sparse No Training"): a finished mask is mended by swapping, no weight changes."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.models.masks import Target, keep_highest
from fedgrove.stages.prune.input_statistics import InputStatistics, Needs

NEEDS: Needs = "moments"

SWAPS = 50  # of each row at most; the paper's
AT_ONCE = 2**20  # entries whose lists are sorted at once; rows do not know of each other


def prune(weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Wanda's mask, then row by row swaps that bring the row's expected output back to what it was.

    The paper's: removing the weights of a row moves its output by ε = Σ_pruned w_ij·E[x_j] on average. While there is one that
    helps, the pruned weight whose return lowers |ε| most for its unsteadiness, w_ij·E[x_j] / Var[x_j], comes back, and the
    kept one of the lowest Wanda score among those whose loss lowers |ε| too goes instead; with N:M the kept one of the lowest
    score in the same group. The variance is the mean over the variances of the windows, as in the published code.

    Ours: E[x_j] is the mean over tokens (the published code has the sum over a window, on which its threshold of 0.1 then
    depends), and instead of a threshold a row ends with the first swap that would not bring ε nearer to zero. The first mask
    has exact counts, a swap keeps them, no weight is swapped twice, and all linears take part (the published code leaves out
    those of the MLP unless told otherwise).

    Args:
        weight: (out, in) float32; overwritten.
        inputs: the ``squares``, ``means`` and ``variances`` of the input channels, (in,) each.
        target: how many weights go; with a pattern (n, m), ``in`` must be a multiple of m.

    Returns:
        The pruned weight and its mask (True = kept).

    Raises:
        ValueError: the statistics hold NaN or infinity.
    """
    if not torch.isfinite(inputs.total).all():  # type: ignore[arg-type]
        raise ValueError("the statistics of the inputs are not finite")
    score = weight.abs() * inputs.squares.sqrt().to(weight.dtype)
    mask = keep_highest([score], target)
    steadiness = 1 / inputs.variances.clamp(min=1e-12 * float(inputs.variances.max()) or 1.0)
    rows = max(1, AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        effect = weight[part].double() * inputs.means
        _swap(mask[part], effect, effect * steadiness, score[part], target.pattern[1] if target.pattern else None)
    return weight.masked_fill_(~mask, 0.0), mask


def _swap(mask: Tensor, effect: Tensor, worth: Tensor, score: Tensor, group: int | None) -> None:
    """Mends a mask in place; all (rows, in). ``worth``: of a pruned weight's return, by its sign; ``group``: N:M's M."""
    never = float("inf")
    pruned, kept = ~mask, mask.clone()
    # of each row, by the sign of ε that they mend: who comes back, best first; who goes, cheapest first
    back, gone = [], []
    for sign in (-1, 1):
        back.append(
            (worth * sign).masked_fill(~pruned | (effect * sign <= 0), -never).sort(dim=1, descending=True, stable=True)
        )
        gone.append(score.masked_fill(~kept | (effect * sign >= 0), never).sort(dim=1, stable=True))
    error = effect.masked_fill(mask, 0.0).sum(1)
    at_back, at_gone = error.new_zeros(2, len(error), dtype=torch.int64), error.new_zeros(2, len(error), dtype=torch.int64)
    row = torch.arange(len(error), device=error.device)
    open_ = torch.ones(len(error), dtype=torch.bool, device=error.device)
    last = mask.shape[1] - 1
    for _ in range(SWAPS):
        side = (error > 0).long()
        i = at_back[side, row].clamp(max=last)
        comes = torch.where(side == 1, back[1].indices[row, i], back[0].indices[row, i])
        possible = torch.where(side == 1, back[1].values[row, i], back[0].values[row, i]) > -never
        if group is None:
            j = at_gone[side, row].clamp(max=last)
            goes = torch.where(side == 1, gone[1].indices[row, j], gone[0].indices[row, j])
            possible &= torch.where(side == 1, gone[1].values[row, j], gone[0].values[row, j]) < never
        else:
            first = comes // group * group
            near = first[:, None] + torch.arange(group, device=first.device)
            costs = score.gather(1, near).masked_fill(~kept.gather(1, near), never)
            goes = first + costs.argmin(1)
            possible &= costs.amin(1) < never
        after = error - effect[row, comes] + effect[row, goes]
        open_ &= possible & (after.abs() < error.abs())
        if not open_.any():
            return
        at, come, go = row[open_], comes[open_], goes[open_]
        mask[at, come], mask[at, go] = True, False
        kept[at, go] = False  # and what came back was never in it: nobody is swapped twice
        error = torch.where(open_, after, error)
        at_back[side[open_], at] += 1
        at_gone[side[open_], at] += 1
