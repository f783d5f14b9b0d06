"""Allocations: how sparse each block becomes. A new allocation is a new file here; its file name is its name in the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from fedgrove import plugins
from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind

PACKAGE = "stages.prune.allocation"


@dataclass(frozen=True)
class Options:
    """The keys of a stage's table that allocations read; see their files."""

    owl_m: float = 5.0
    owl_lambda: float = 0.08


class Allocation(Protocol):
    """The contract of an allocation's file.

    Attributes:
        NEEDS: the statistics that it needs of a linear's inputs; with "nothing" blocks are not measured, and no client gets a
            request.
    """

    NEEDS: StatisticsKind

    def measure(self, weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics], options: Options) -> float:
        """Measures a block, on a client from its own statistics or on the server from pooled ones.

        Args:
            weights: the block's linears, (out, in).
            inputs: the statistics of their inputs.

        Returns:
            A number in [0, 1].
        """
        ...

    def allocate(self, measured: Sequence[float], sizes: Sequence[int], sparsity: float, options: Options) -> list[float]:
        """The sparsity of each block; the mean over all weights is ``sparsity``.

        Args:
            measured: by block.
            sizes: number of weights by block.
        """
        ...


METHOD = Allocation


def allocation_of(name: str) -> Allocation:
    """Loads an allocation by name."""
    return cast(Allocation, plugins.load(PACKAGE, name))
