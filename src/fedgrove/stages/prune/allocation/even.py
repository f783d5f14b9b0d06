"""The same sparsity in every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind
from fedgrove.stages.prune.allocation import Options

NEEDS: StatisticsKind = "nothing"


def measure(weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics], options: Options) -> float:
    """Measures nothing."""
    return 0.0


def allocate(measured: Sequence[float], sizes: Sequence[int], sparsity: float, options: Options) -> list[float]:
    """``sparsity`` for every block."""
    return [sparsity] * len(sizes)
