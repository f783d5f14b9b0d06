"""Pruners: tensors in, tensors out. A new pruner is a new file here; its file name is its name in the job.

A pruner's file holds two names:

    NEEDS: "nothing", "squares", "moments" or "gram": what it wants to know of the inputs of a linear
    prune(weight, inputs, target) -> (weight, mask)

``weight`` is (out, in) in float32 and may be overwritten; ``inputs`` is an
:class:`~fedgrove.stages.prune.input_statistics.InputStatistics`;
``target`` a :class:`~fedgrove.models.masks.Target`. The result is the pruned weight, zero where the mask is False, and the
mask (True = kept), with exactly ``target.num_pruned(weight.numel())`` entries False.
"""

from __future__ import annotations

from typing import Literal, Protocol, cast

from torch import Tensor

from fedgrove import plugins
from fedgrove.models.masks import Target
from fedgrove.stages.prune.input_statistics import InputStatistics, Needs

Damping = Literal["mean", "each"]
PACKAGE = "stages.prune.pruners"


class Pruner(Protocol):
    """What a pruner's file holds."""

    NEEDS: Needs

    def prune(self, weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
        """(out, in) float32 -> the pruned weight and its mask."""
        ...


METHOD = Pruner


def pruner_of(name: str) -> Pruner:
    """The pruner of that name."""
    return cast(Pruner, plugins.load(PACKAGE, name))


def pruner_for(name: str, inputs: InputStatistics) -> Pruner:
    """The pruner of that name; magnitude where it wants to know of inputs of which nothing was seen.

    An expert that the router sent no calibration token has such inputs: then the size of a weight is all there is to go by.
    """
    return pruner_of("magnitude" if inputs.needs != "nothing" and inputs.silent else name)


def prune(name: str, weight: Tensor, inputs: InputStatistics, target: Target, damping: Damping) -> tuple[Tensor, Tensor]:
    """What :func:`pruner_for` makes of a weight, damped as the job wants it.

    SparseGPT adds 1 % of the mean of all channels' Σ x² to each channel's. A few channels of a language model are many times
    larger than the others; then that is much more than the others have, and nothing makes up for what is pruned there. So
    with "each" (ours) channels are first brought to one size, by powers of two and so exactly: the same problem, in which every
    channel gets about 1 % of its own. Pruners that only compare, such as Wanda, give the same bits either way.

    Args:
        name: of a pruner.
        weight, inputs, target: see above; with "each" the ``inputs`` are equilibrated afterwards.
        damping: "mean": as published; "each".
    """
    pruner = pruner_for(name, inputs)
    if damping == "mean" or pruner.NEEDS != "gram":
        return pruner.prune(weight, inputs, target)
    powers = inputs.equilibrate().to(weight.dtype)
    weight, mask = pruner.prune(weight.mul_(powers), inputs, target)
    return weight.div_(powers), mask
