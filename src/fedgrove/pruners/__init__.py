"""Pruners: tensors in, tensors out. A new pruner is a new file here; its file name is its name in the job.

A pruner's file holds two names:

    NEEDS: "nothing", "squares", "moments" or "gram": what it wants to know of the inputs of a linear
    prune(weight, inputs, target) -> (weight, mask)

``weight`` is (out, in) in float32 and may be overwritten; ``inputs`` is an :class:`~fedgrove.inputs.Inputs`;
``target`` a :class:`~fedgrove.masks.Target`. The result is the pruned weight, zero where the mask is False, and the
mask (True = kept), with exactly ``target.num_pruned(weight.numel())`` entries False.
"""

from __future__ import annotations

from types import ModuleType

from fedgrove import plugins
from fedgrove.inputs import Inputs


def pruner_for(name: str, inputs: Inputs) -> ModuleType:
    """The pruner of that name; magnitude where it wants to know of inputs of which nothing was seen.

    An expert that the router sent no calibration token has such inputs: then the size of a weight is all there is to go by.
    """
    return plugins.load("pruners", "magnitude" if inputs.needs != "nothing" and inputs.silent else name)
