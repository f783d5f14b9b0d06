"""How much of each block goes: a new way is a new file here; its file name is its name in the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from fedgrove import plugins
from fedgrove.stages.prune.input_statistics import InputStatistics, Needs

PACKAGE = "stages.prune.allocation"


@dataclass(frozen=True)
class Options:
    """What a job can set; see the files that read it."""

    owl_m: float = 5.0
    owl_lambda: float = 0.08


class Allocation(Protocol):
    """What an allocation's file holds.

    Attributes:
        NEEDS: what it wants to know of the inputs of a linear; "nothing": blocks are not measured, and nobody is asked.
    """

    NEEDS: Needs

    def measure(self, weights: Mapping[str, Tensor], inputs: Mapping[str, InputStatistics], options: Options) -> float:
        """A number in [0, 1] for a block: what a client says of it, or the server of pooled sums.

        Args:
            weights: a block's linears, (out, in); inputs: their statistics.
        """
        ...

    def allocate(self, measured: Sequence[float], sizes: Sequence[int], sparsity: float, options: Options) -> list[float]:
        """The sparsity of each block, whose mean over all weights is ``sparsity``; ``sizes``: weights of each block."""
        ...


METHOD = Allocation


def allocation_of(name: str) -> Allocation:
    """The allocation of that name."""
    return cast(Allocation, plugins.load(PACKAGE, name))
