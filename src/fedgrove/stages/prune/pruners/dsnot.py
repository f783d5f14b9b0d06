"""DSnoT (Zhang et al., ICLR 2024, "Dynamic Sparse No Training") from Wanda's mask; no weight changes its value."""

from __future__ import annotations

from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind
from fedgrove.models.masks import Target
from fedgrove.stages.prune.menders import dsnot
from fedgrove.stages.prune.pruners import wanda

NEEDS: StatisticsKind = "moments"


def prune(weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
    """Starts from Wanda's mask, then swaps weights within each row to restore the row's expected output; see
    :mod:`fedgrove.stages.prune.menders.dsnot`.

    The initial mask has exact counts, and all linears take part (the published code skips those of the MLP by default).

    Args:
        weight: (out, in) float32.
        inputs: the ``squares``, ``means`` and ``variances`` of the input channels, (in,) each.
        target: how many weights are pruned; with a pattern (n, m), ``in`` must be a multiple of m.

    Returns:
        The pruned weight and its mask (True = kept).

    Raises:
        ValueError: the statistics hold NaN or infinity.
    """
    pruned, mask = wanda.prune(weight.clone(), inputs, target)
    return dsnot.mend(weight, pruned, mask, inputs, target)
