"""Menders improve a mask that something else made. A new mender is a new file here; its file name is its name in the job.

A mender's file holds one function, ``mend``: see :class:`Mender`.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from fedgrove import plugins
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.masks import Target

PACKAGE = "stages.prune.menders"


class Mender(Protocol):
    """The contract of a mender's file."""

    def mend(
        self, before: Tensor, after: Tensor, mask: Tensor, inputs: InputStatistics, target: Target
    ) -> tuple[Tensor, Tensor]:
        """A better weight and mask, with as many weights kept in every row, and in every group of an N:M pattern.

        Args:
            before: (out, in) float32, the weight before it was pruned.
            after: (out, in) float32, the pruned weight, zero where the mask is False.
            mask: (out, in) bool, True = kept; may be overwritten.
            inputs: of kind "moments".
            target: gives the pattern; the counts are those of the mask.
        """
        ...


METHOD = Mender


def mender_of(name: str) -> Mender:
    """Loads a mender by name."""
    return cast(Mender, plugins.load(PACKAGE, name))
