"""A quick search for a client's configuration that knows how far from the best it may be.

FedPipe (arXiv 2404.06448) has a "fast search algorithm"; its text was not at hand, so this one is ours. Once bits and batch
are chosen, what is left is a knapsack with two sizes, bytes and seconds: each linear is given one of a few ranks. Weigh the
two into one, and its relaxed optimum is found by sorting; whatever the weights, no configuration is worth more than that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Places = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
TRIES = 10  # weights of bytes against seconds, at most


@dataclass(frozen=True)
class KnapsackSide:
    """One value of bits, or of the batch.

    Attributes:
        worth: of the value alone.
        sizes: (linears, ranks), positive: what each linear takes at each rank, affine in the rank.
        room: for their sum.
    """

    worth: float
    sizes: Array
    room: float

    def shares(self) -> Array:
        """The sizes in units of the room; a room that nothing could fill becomes one that everything just fills."""
        return self.sizes / min(self.room, float(self.sizes.max(1).sum()))


@dataclass(frozen=True)
class Solution:
    """What a search came to.

    Attributes:
        bits, batch: their places.
        ranks: (linears,) the place of each linear's rank, -1 for none.
        value: of all that; bound: what nothing that fits is worth more than.
    """

    bits: int
    batch: int
    ranks: Places
    value: float
    bound: float


def search(worth: Array, bits: Sequence[KnapsackSide], batches: Sequence[KnapsackSide], gap: float) -> Solution | None:
    """The best of filling up by worth for size.

    Args:
        worth: (linears, ranks), of each linear at each rank; concave in the rank.
        gap: bits and batches that cannot be better than what was found by so much, relative, are not looked into.

    Returns:
        None where it found nothing that tunes a linear and fits.
    """
    sides = [[(place, side, side.shares()) for place, side in enumerate(part) if side.room > 0] for part in (bits, batches)]
    alone = [{place: _steps(worth, shares)[0] for place, _, shares in part} for part in sides]
    bounds = {
        (a, b): one.worth + other.worth + min(alone[0][a], alone[1][b])
        for (a, one, _), (b, other, _) in itertools.product(*sides)
    }
    shares = [{place: its for place, _, its in part} for part in sides]
    best: Solution | None = None
    for a, b in sorted(bounds, key=lambda places: -bounds[places]):
        given = bits[a].worth + batches[b].worth
        for bound, ranks in _fillings(worth, shares[0][a], shares[1][b]):
            bounds[a, b] = min(bounds[a, b], given + bound)
            tuned = np.flatnonzero(ranks >= 0)
            value = given + float(worth[tuned, ranks[tuned]].sum())
            if len(tuned) and (best is None or value > best.value):
                best = Solution(a, b, ranks, value, 0.0)
            if best is not None and bounds[a, b] <= best.value + gap * abs(best.value):
                break
    return best and Solution(best.bits, best.batch, best.ranks, best.value, max(bounds.values()))


def _fillings(worth: Array, first: Array, second: Array) -> Iterator[tuple[float, Places]]:
    """Bounds, and ranks that fit, as the weight of the two sizes is moved to where both rooms are used up."""
    low, high, at = 0.0, 1.0, 1.0
    for _ in range(TRIES):
        bound, linears, ranks = _steps(worth, at * first + (1 - at) * second)
        filled, full = _fill(linears, ranks, first, second)
        yield bound, filled
        if full is None or (full == 0 and at == 1.0):
            return
        low, high = (at, high) if full == 0 else (low, at)
        at = (low + high) / 2


def _steps(worth: Array, sizes: Array) -> tuple[float, Places, Places]:
    """Steps up the ranks by falling worth for size, and what is worth most that fits a room of 1, if steps could be split.

    A linear's first step goes to the rank that is worth most for its size; smaller ones are left out, as what they are worth
    is less than the same part of that. From there on each further step is worth less for its size.
    """
    every = np.arange(len(worth))
    start = (worth / sizes).argmax(1)
    more, larger = np.diff(worth, axis=1, prepend=0.0), np.diff(sizes, axis=1, prepend=0.0)
    more[every, start], larger[every, start] = worth[every, start], sizes[every, start]
    density = np.where(np.arange(worth.shape[1]) < start[:, None], 0.0, more / larger).ravel()
    order = np.argsort(-density, kind="stable")[: int((density > 0).sum())]
    used = np.cumsum(larger.ravel()[order])
    whole = int(np.searchsorted(used, 1.0, side="right"))
    bound = float(more.ravel()[order[:whole]].sum())
    if whole < len(order):
        bound += float(density[order[whole]]) * (1.0 - (float(used[whole - 1]) if whole else 0.0))
    return bound, order // worth.shape[1], order % worth.shape[1]


def _fill(linears: Places, ranks: Places, first: Array, second: Array) -> tuple[Places, int | None]:
    """Takes the steps that fit both rooms, in order; also: the room, 0 or 1, that the first step that did not fit was over."""
    filled = np.full(len(first), -1)
    both = np.stack([first, second])
    before = np.full(len(linears), -1)  # the rank that a step is taken from
    order = np.lexsort((ranks, linears))
    same = linears[order][1:] == linears[order][:-1]
    before[order[1:][same]] = ranks[order[:-1][same]]
    sizes = both[:, linears, ranks] - np.where(before >= 0, both[:, linears, before], 0.0)
    used = np.cumsum(sizes, axis=1)
    fits = (used <= 1.0).all(0)
    whole = len(order) if fits.all() else int(fits.argmin())
    filled[linears[:whole]] = ranks[:whole]  # a linear's later steps come later
    if whole == len(order):
        return filled, None
    left = 1.0 - (used[:, whole - 1] if whole else np.zeros(2))
    for step in whole + np.flatnonzero((sizes[:, whole:] <= left[:, None]).all(0)):
        if filled[linears[step]] == before[step] and (sizes[:, step] <= left).all():
            filled[linears[step]] = ranks[step]
            left = left - sizes[:, step]
    return filled, int(used[0, whole] <= 1.0)
