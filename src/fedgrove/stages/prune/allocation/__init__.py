"""How much of each block goes: a new way is a new file here; its file name is its name in the job.

A way's file holds three names:

    NEEDS: "nothing" or "squares": what it wants to know of the inputs of a linear
    measure(weights, inputs, options) -> a number in [0, 1] for a block: what a client says of it, or the server of pooled sums
    allocate(measured, sizes, sparsity, options) -> the sparsity of each block, whose mean over all weights is ``sparsity``

``weights`` are a block's linears as (out, in) by name, ``inputs`` their :class:`~fedgrove.stages.prune.input_statistics.InputStatistics`, ``sizes`` the number
of weights of each block, ``options`` an :class:`Options`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What a job can set; see the files that read it."""

    owl_m: float = 5.0
    owl_lambda: float = 0.08
