"""The search for a client's configuration: a fast one, with an upper bound on how far it is from the optimum, and a program.

FedPipe (arXiv 2404.06448) has a "fast search algorithm"; its text was not available, so this one is ours. For given bits and
batch, choosing one of a few ranks for each linear is a multiple-choice knapsack with two constraints, bytes and seconds. A
weighted sum of both constraints (surrogate relaxation) leaves one constraint, whose linear relaxation is solved by sorting.
For any weights this gives an upper bound on the value of all feasible configurations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
MAX_ITERATIONS = 10  # of the bisection over the weight of bytes against seconds


class Infeasible(Exception):
    """No configuration fits; the message says which budget is too small and what would be needed."""


@dataclass(frozen=True)
class KnapsackSide:
    """One choice of bits (the constraint is bytes) or of the batch (the constraint is seconds).

    Attributes:
        value: of this choice alone.
        sizes: (linears, ranks), positive: what each linear takes of the capacity at each rank, affine in the rank.
        capacity: the limit of the sum of the sizes.
    """

    value: float
    sizes: Array
    capacity: float

    def fractions(self) -> Array:
        """The sizes as fractions of the capacity; a capacity larger than the total size is clamped to the total."""
        return self.sizes / min(self.capacity, float(self.sizes.max(1).sum()))


@dataclass(frozen=True)
class Solution:
    """The result of a search.

    Attributes:
        bits, batch: their indices.
        ranks: (linears,), the index of each linear's rank, -1 for none.
        value: of the configuration.
        bound: upper bound on the value of all feasible configurations.
    """

    bits: int
    batch: int
    ranks: Indices
    value: float
    bound: float


def search(values: Array, bits: Sequence[KnapsackSide], batches: Sequence[KnapsackSide], gap: float) -> Solution | None:
    """The best configuration that greedy filling by value per size finds.

    Args:
        values: (linears, ranks), the value of each linear at each rank; concave in the rank.
        gap: bits and batches are skipped if they cannot improve the best value found by more than this.

    Returns:
        None if it found no feasible configuration that tunes a linear.
    """
    sides = [[(at, side, side.fractions()) for at, side in enumerate(part) if side.capacity > 0] for part in (bits, batches)]
    single_bounds = [{at: _relaxed(values, sizes)[0] for at, _, sizes in part} for part in sides]
    bounds = {
        (a, b): one.value + other.value + min(single_bounds[0][a], single_bounds[1][b])
        for (a, one, _), (b, other, _) in itertools.product(*sides)
    }
    fractions = [{at: sizes for at, _, sizes in part} for part in sides]
    best: Solution | None = None
    for a, b in sorted(bounds, key=lambda pair: -bounds[pair]):
        if best is not None and bounds[a, b] <= best.value + gap:
            break  # nor can the others, whose bounds are lower
        base = bits[a].value + batches[b].value
        for bound, ranks in _fillings(values, fractions[0][a], fractions[1][b]):
            bounds[a, b] = min(bounds[a, b], base + bound)
            tuned = np.flatnonzero(ranks >= 0)
            value = base + float(values[tuned, ranks[tuned]].sum())
            if len(tuned) and (best is None or value > best.value):
                best = Solution(a, b, ranks, value, 0.0)
            if best is not None and bounds[a, b] <= best.value + gap:
                break
    return best and Solution(best.bits, best.batch, best.ranks, best.value, max(bounds.values()))


def solve(values: Array, bits: Sequence[KnapsackSide], batches: Sequence[KnapsackSide], gap: float) -> Solution:
    """The same as :func:`search`, as a mixed-integer linear program solved by HiGHS.

    There is one binary variable per number of bits and per batch, exactly one of each being 1, and one per linear and step to
    the next rank; a step requires the one below it. The bytes depend on the bits and the seconds on the batch, which would
    be products of variables; instead each number of bits and each batch has its own constraint, which is slack unless it is
    chosen.

    Raises:
        Infeasible: no configuration fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes 0.3 s and 20 MB, which other stages do not need
    from scipy.sparse import csr_array

    num_bits = len(bits)
    first = num_bits + len(batches)  # the variables of linear i, step k: first + i * num_steps + k
    size = first + values.size
    shift = 2.0 - max(side.value for side in batches)  # a relative gap needs a value that is not near 0
    paces = [side.value + shift for side in batches]
    objective = np.concatenate([[side.value for side in bits], paces, np.diff(values, axis=1, prepend=0.0).ravel()])

    rows: list[Array] = []
    upper: list[float] = []
    lower: list[float] = []

    def row(variables: slice, coefficient: float, steps: Array | float, low: float, high: float) -> None:
        coefficients = np.zeros(size)
        coefficients[variables], coefficients[first:] = coefficient, steps
        rows.append(coefficients)
        lower.append(low)
        upper.append(high)

    row(slice(0, num_bits), 1.0, 0.0, 1.0, 1.0)
    row(slice(num_bits, first), 1.0, 0.0, 1.0, 1.0)
    for index, side in enumerate((*bits, *batches)):
        if side.capacity < 0:
            row(slice(index, index + 1), 1.0, 0.0, 0.0, 0.0)
            continue
        steps = np.diff(side.sizes, axis=1, prepend=0.0).ravel()
        slack = float(steps.sum()) - side.capacity
        if slack > 0:
            scale = max(side.capacity, float(steps.max()))
            row(slice(index, index + 1), slack / scale, steps / scale, -np.inf, (side.capacity + slack) / scale)
    first_steps = np.zeros(values.shape)
    first_steps[:, 0] = 1.0
    row(slice(0), 0.0, first_steps.ravel(), 1.0, np.inf)  # at least one linear is tuned

    constraints = [LinearConstraint(csr_array(np.array(rows)), lower, upper)]
    variables = np.arange(first, size).reshape(values.shape)
    pairs = np.stack([variables[:, :-1].ravel(), variables[:, 1:].ravel()], 1)
    if len(pairs):
        row_of = np.repeat(np.arange(len(pairs)), 2)
        order = csr_array((np.tile([1.0, -1.0], len(pairs)), (row_of, pairs.ravel())), shape=(len(pairs), size))
        constraints.append(LinearConstraint(order, 0.0, np.inf))
    options = {"mip_rel_gap": gap / 2}
    result = milp(-objective, constraints=constraints, integrality=np.ones(size), bounds=Bounds(0, 1), options=options)
    if result.x is None:
        raise Infeasible(f"no configuration fits both memory and deadline ({result.message.split('(')[0].strip()})")
    chosen = result.x > 0.5
    ranks = chosen[first:].reshape(values.shape).sum(1) - 1
    bits_index, batch_index = int(chosen[:num_bits].argmax()), int(chosen[num_bits:first].argmax())
    return Solution(bits_index, batch_index, ranks, -float(result.fun) - shift, -float(result.mip_dual_bound) - shift)


def _fillings(values: Array, first: Array, second: Array) -> Iterator[tuple[float, Indices]]:
    """Bounds and feasible ranks, while bisection moves the weight of the two constraints to where both are tight."""
    low, high, weight = 0.0, 1.0, 1.0
    for _ in range(MAX_ITERATIONS):
        bound, linears, ranks = _relaxed(values, weight * first + (1 - weight) * second)
        filled, exceeded = _fill(linears, ranks, first, second)
        yield bound, filled
        if exceeded is None or (exceeded == 0 and weight == 1.0):
            return
        low, high = (weight, high) if exceeded == 0 else (low, weight)
        weight = (low + high) / 2


def _relaxed(values: Array, sizes: Array) -> tuple[float, Indices, Indices]:
    """Solves the linear relaxation with one constraint of capacity 1.

    A linear's first step goes directly to the rank with the highest value per size: the linear relaxation never uses the ranks
    below it. Each later step to the next rank has a lower value per size than the one before.

    Returns:
        The optimal value, an upper bound; and the steps by descending value per size, as linears and the ranks they lead to.
    """
    every = np.arange(len(values))
    start = (values / sizes).argmax(1)
    gains, growth = np.diff(values, axis=1, prepend=0.0), np.diff(sizes, axis=1, prepend=0.0)
    gains[every, start], growth[every, start] = values[every, start], sizes[every, start]
    density = np.where(np.arange(values.shape[1]) < start[:, None], 0.0, gains / growth).ravel()
    order = np.argsort(-density, kind="stable")[: int((density > 0).sum())]
    used = np.cumsum(growth.ravel()[order])
    complete = int(np.searchsorted(used, 1.0, side="right"))  # the steps that fit; of the next one, a part fits
    bound = float(gains.ravel()[order[:complete]].sum())
    if complete < len(order):
        bound += float(density[order[complete]]) * (1.0 - (float(used[complete - 1]) if complete else 0.0))
    return bound, order // values.shape[1], order % values.shape[1]


def _fill(linears: Indices, ranks: Indices, first: Array, second: Array) -> tuple[Indices, int | None]:
    """Takes the steps that satisfy both constraints, in order.

    Returns:
        (linears,), the rank of each linear, -1 for none; and which constraint, 0 or 1, the first step that did not fit
        exceeded, or None if all steps fit.
    """
    filled = np.full(len(first), -1)
    both = np.stack([first, second])
    before = np.full(len(linears), -1)  # the rank before each step
    order = np.lexsort((ranks, linears))
    same = linears[order][1:] == linears[order][:-1]
    before[order[1:][same]] = ranks[order[:-1][same]]
    sizes = both[:, linears, ranks] - np.where(before >= 0, both[:, linears, before], 0.0)
    used = np.cumsum(sizes, axis=1)
    fits = (used <= 1.0).all(0)
    complete = len(order) if fits.all() else int(fits.argmin())
    filled[linears[:complete]] = ranks[:complete]  # a linear's steps are in order, so its last assignment is its highest rank
    if complete == len(order):
        return filled, None
    left = 1.0 - (used[:, complete - 1] if complete else np.zeros(2))
    for step in complete + np.flatnonzero((sizes[:, complete:] <= left[:, None]).all(0)):
        if filled[linears[step]] == before[step] and (sizes[:, step] <= left).all():
            filled[linears[step]] = ranks[step]
            left = left - sizes[:, step]
    return filled, int(used[0, complete] <= 1.0)
