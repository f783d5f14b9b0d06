"""Averages the products at any ranks: the method of FlexLoRA (arXiv 2402.11505) with raFLoRA's weights (arXiv 2602.13486)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fedgrove.stages.tune.aggregation import Form, Options
from fedgrove.stages.tune.aggregation import leading as begin
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.factors import Factors, ProductSum

TAKES: frozenset[Form] = frozenset({"factors"})
EQUAL_RANKS = False
SHARED_A = False
SERVER_OPTIMIZERS = True
DEFAULTS: Mapping[str, Any] = {}

__all__ = ["EQUAL_RANKS", "SERVER_OPTIMIZERS", "SHARED_A", "TAKES", "add", "begin", "finish", "sums"]

Bands = dict[tuple[int, int], ProductSum]  # by the first term and the one after the last; divided at the clients' ranks


def sums(state: State[Factors], ranks: Sequence[int]) -> Bands:
    """One sum per band of terms. The bands are divided at the planned ranks: which clients will respond is not known yet."""
    shape = state.live.b.shape[0], state.live.a.shape[1]
    edges = sorted({0, *ranks})
    return {band: ProductSum(*shape) for band in itertools.pairwise(edges)}


def add(bands: Bands, factors: Factors, weight: float) -> None:
    """Adds a client's product to the bands that its rank covers."""
    for (start, end), band in bands.items():
        if factors.rank >= end:
            band.add(factors.part(start, end), weight)


def finish(state: State[Factors], bands: Bands, options: Options) -> State[Factors]:
    """Adds up the bands' mean products, and compresses the sum to ``options.rank`` terms by QR and a small SVD.

    With ``partition`` (raFLoRA) a band is averaged over the clients that have it, so that terms above the smallest rank do not
    shrink from round to round. Without it, a band is averaged over all clients, where a client that lacks the band contributes
    the value that it started with: the result is exactly the mean of the clients' models. With equal ranks both are the same.

    From the papers: bands, averaging over contributors, √S in both factors. Ours: a client computes with the terms that it does
    not train (see :class:`~fedgrove.stages.tune.changes.Start`), so that nothing shrinks without ``partition`` either; terms
    that no client trained in this round keep their value.
    """
    total = max((band.weight for band in bands.values()), default=0.0)
    if not total:
        return state
    parts = [state.live.part(max(bands)[1], state.live.rank)]
    for (start, end), band in bands.items():
        fraction = 1.0 if options.partition and band.weight else band.weight / total
        if band.weight:
            parts.append(band.mean().scaled(fraction))
        if fraction < 1:
            parts.append(state.live.part(start, end).scaled(1 - fraction))
    return State(parts[0].plus(*parts[1:]).compress(options.rank), state.frozen)
