"""Pruners: tensors in, tensors out. A new pruner is a new file here; its file name is its name in the job.

A pruner's file holds two names:

    NEEDS: "nothing", "squares", "moments" or "gram": what it wants to know of the inputs of a linear
    prune(weight, inputs, target) -> (weight, mask)

``weight`` is (out, in) in float32 and may be overwritten; ``inputs`` is an :class:`~fedgrove.inputs.Inputs`;
``target`` a :class:`~fedgrove.masks.Target`. The result is the pruned weight, zero where the mask is False, and the
mask (True = kept), with exactly ``target.num_pruned(weight.numel())`` entries False.
"""
