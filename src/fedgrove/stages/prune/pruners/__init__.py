"""Pruners: tensors in, tensors out. A new pruner is a new file here; its file name is its name in the job.

A pruner's file holds two names:

    NEEDS: "nothing", "squares", "moments" or "gram": the statistics that it needs of a linear's inputs
    prune(weight, inputs, target) -> (weight, mask)

``weight`` is (out, in) float32 and may be overwritten; ``inputs`` is an
:class:`~fedgrove.input_statistics.statistics.InputStatistics`; ``target`` is a :class:`~fedgrove.models.masks.Target`. The
result is the pruned weight, zero where the mask is False, and the mask (True = kept), with exactly
``target.num_pruned(weight.numel())`` entries False. A third name, ``EFFORT``, is for plans: see :class:`Effort`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from torch import Tensor

from fedgrove import plugins
from fedgrove.input_statistics.statistics import InputStatistics, StatisticsKind
from fedgrove.models.masks import Target

Damping = Literal["mean", "each"]
PACKAGE = "stages.prune.pruners"


class Pruner(Protocol):
    """The contract of a pruner's file."""

    NEEDS: StatisticsKind

    def prune(self, weight: Tensor, inputs: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
        """(out, in) float32 -> the pruned weight and its mask (True = kept)."""
        ...


METHOD = Pruner


@dataclass(frozen=True)
class Effort:
    """What a pruner with a Gram matrix takes besides that matrix; for plans. The default is SparseGPT's.

    Attributes:
        squares: float32 matrices of (in, in) in memory.
        matrices: float32 matrices of (out, in) in memory, the weight among them.
        products: how often (out, in) is multiplied by (in, in).
        factors: how often (in, in) is factored.
    """

    squares: int = 1
    matrices: int = 6
    products: float = 0.5
    factors: float = 1.0

    def operations(self, shapes: Iterable[tuple[int, int]], inputs: Iterable[int]) -> float:
        """Floating-point operations for linears of these shapes, (out, in), whose different inputs have these widths."""
        factors, products = sum(4 * width**3 / 3 for width in inputs), sum(2 * rows * width**2 for rows, width in shapes)
        return self.factors * factors + self.products * products


def effort_of(name: str) -> Effort:
    """What a pruner takes; SparseGPT's effort where its file says nothing."""
    return cast(Effort, getattr(pruner_of(name), "EFFORT", Effort()))


def pruner_of(name: str) -> Pruner:
    """Loads a pruner by name."""
    return cast(Pruner, plugins.load(PACKAGE, name))


def pruner_for(name: str, inputs: InputStatistics) -> Pruner:
    """Loads a pruner by name, but magnitude instead if the pruner needs statistics and the inputs were all zero or absent.

    This happens to an expert to which the router sent no calibration token: only the weights themselves are known.
    """
    return pruner_of("magnitude" if inputs.kind != "nothing" and inputs.silent else name)


def prune(name: str, weight: Tensor, inputs: InputStatistics, target: Target, damping: Damping) -> tuple[Tensor, Tensor]:
    """Prunes a weight with :func:`pruner_for`, under the job's kind of damping.

    SparseGPT damps each channel's Σ x² by 1 % of the mean over all channels. In language models a few channels are many times
    larger than the rest, so this damping exceeds most channels' Σ x², and hardly any pruning error in them is compensated.
    With "each" (ours) channels are first equilibrated: scaled to about the same size by powers of two, which is exact, so that
    every channel is damped by about 3 % of its own Σ x², and a nearly silent one by a part of the median
    (:meth:`~fedgrove.input_statistics.statistics.InputStatistics.equilibrate`). The result of pruners that only compare
    scores, such as Wanda, is the same bit for bit either way.

    Args:
        name: a pruner's name.
        weight, inputs, target: see above; with "each", ``inputs`` is equilibrated in place.
        damping: "mean" as published, or "each".

    Returns:
        The pruned weight and its mask (True = kept), both (out, in).

    Raises:
        ValueError: the statistics hold NaN or infinity, or the Gram matrix cannot be factored.
    """
    pruner = pruner_for(name, inputs)
    if damping == "mean" or pruner.NEEDS != "gram":
        return pruner.prune(weight, inputs, target)
    powers = inputs.equilibrate().to(weight.dtype)
    weight, mask = pruner.prune(weight.mul_(powers), inputs, target)
    return weight.div_(powers), mask
