"""Pooled statistics: clients send sums over the inputs of each linear, and the server prunes with the totals.

Wanda, DSnoT and SparseGPT only need sums over tokens. The clients' sums add up to the sum over their pooled data, so the result
is the one that a single owner of all the data would get, bit for bit. (Additivity is plain algebra; the fixed-point numbers of
:mod:`fedgrove.input_statistics.fixed_point` are ours.)
"""

from __future__ import annotations

from typing import Literal

from fedgrove.rounds.request import Disclosure

SENDS = frozenset(
    {Disclosure.SQUARES, Disclosure.PRODUCTS, Disclosure.MOMENTS}
)  # which of them depends on the pruner: see exchanges/statistics.py
SOLVED_AT: Literal["client", "server"] = "server"
READS = frozenset({"mixed", "protect_first_block", "epsilon", "personal"})
SECURE = True
SOURCE: Literal["dense", "sequential"] = "dense"
DAMPING: Literal["mean", "each"] = "each"
