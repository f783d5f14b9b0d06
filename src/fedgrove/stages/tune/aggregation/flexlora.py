"""The mean of the products, whatever the ranks: FlexLoRA's idea (arXiv 2402.11505), raFLoRA's weights (arXiv 2602.13486)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fedgrove.stages.tune.aggregation import Form, Options
from fedgrove.stages.tune.aggregation import leading as begin
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.factors import Factors, ProductSum

TAKES: frozenset[Form] = frozenset({"factors"})
EQUAL_RANKS = False
SHARED_A = False
SERVER_OPTIMIZERS = True

__all__ = ["EQUAL_RANKS", "SERVER_OPTIMIZERS", "SHARED_A", "TAKES", "add", "begin", "finish", "sums"]

Bands = dict[tuple[int, int], ProductSum]  # terms from..to, cut where some client's rank ends


def sums(state: State[Factors], ranks: Sequence[int]) -> Bands:
    """One sum for each band of terms, cut at the planned ranks: not at those who answered, which nobody can foresee."""
    shape = state.live.b.shape[0], state.live.a.shape[1]
    edges = sorted({0, *ranks})
    return {band: ProductSum(*shape) for band in itertools.pairwise(edges)}


def add(bands: Bands, factors: Factors, weight: float) -> None:
    """Adds a client's product to the bands that its rank covers."""
    for (start, end), band in bands.items():
        if factors.rank >= end:
            band.add(factors.part(start, end), weight)


def finish(state: State[Factors], bands: Bands, options: Options) -> State[Factors]:
    """Σ over bands of the mean of the products, back to ``options.rank`` terms through QR and a small SVD.

    With ``partition`` (raFLoRA) a band is the mean over those who have it, so that energy above the smallest rank does not
    shrink from round to round. Without, everybody counts in every band, and who lacks one counts with what it was given:
    then the result is exactly the mean of the clients' whole models. With equal ranks both are the same.

    The papers': bands, contributors, √S on both sides. Ours: terms that a client does not train are not lost to it (see
    :class:`~fedgrove.stages.tune.changes.Start`), so without ``partition`` nothing shrinks either; terms that nobody trained in
    this round keep their value.
    """
    everybody = max((band.weight for band in bands.values()), default=0.0)
    if not everybody:
        return state
    parts = [state.live.part(max(bands)[1], state.live.rank)]
    for (start, end), band in bands.items():
        share = 1.0 if options.partition and band.weight else band.weight / everybody
        if band.weight:
            parts.append(band.mean().scaled(share))
        if share < 1:
            parts.append(state.live.part(start, end).scaled(1 - share))
    return State(parts[0].plus(*parts[1:]).compress(options.rank), state.frozen)
