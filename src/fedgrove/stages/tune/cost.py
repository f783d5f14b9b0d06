"""What a configuration costs a client in memory, time and bytes; and the best one that it can afford.

FedPipe (arXiv 2404.06448) chooses batch size, ranks and bits of each client by a mixed-integer linear program. Its text was
not at hand: that there is such a program over these variables is the paper's, the cost model, the gain and the linear form
are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedgrove.models.cost import ModelCost
from fedgrove.quantities import mebibytes
from fedgrove.stages.tune.knapsack import Array, KnapsackSide, Solution, search

QUANTIZATION_PRICE = {32: 0.0, 16: 0.0, 8: 0.02, 4: 0.1}  # of a whole gain of 2: all ranks and the batch at their largest
PER_TUNED = 16  # bytes of a trained number: itself, its gradient and Adam's two moments, float32
LOGIT = 12  # bytes of a logit at the peak, beside itself: its float32 copy or probability, and two gradients


@dataclass(frozen=True)
class ClientConfig:
    """A client's configuration.

    Attributes:
        bits: of each frozen weight.
        batch: windows of an optimizer step; micro: windows computed at once, on each device.
        ranks: by linear; those that are missing are not tuned.
    """

    bits: int
    batch: int
    micro: int
    ranks: Mapping[str, int]


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen.

    Attributes:
        bits, batches, ranks: the values, ascending but for ``bits``; rank 0 is always allowed.
        steps: optimizer steps of a round.
        rest: rank of what a client computes with and does not train, in every linear; an upper bound.
        number: bytes of a factor's number on the wire.
        upload_price: of sending all linears at the largest rank: a rank that is worth less than it costs to send is not taken.
    """

    bits: tuple[int, ...]
    batches: tuple[int, ...]
    ranks: tuple[int, ...]
    steps: int
    rest: int = 0
    number: float = 1.27
    upload_price: float = 0.4


@dataclass(frozen=True)
class Budget:
    """What a client has: infinite where it does not say.

    Attributes:
        memory: bytes, of each device. seconds: of a round. speed: operations a second, of each device.
        uplink: bytes a second. devices: that share the windows of a step.
    """

    memory: float = math.inf
    seconds: float = math.inf
    speed: float = 3e10
    uplink: float = math.inf
    devices: int = 1


class Infeasible(Exception):
    """No configuration fits; the message says which budget is too small and what would do."""


def weight_bytes(sizes: ModelCost, bits: int) -> float:
    """Bytes of the frozen model: int8 has a scale a row, NF4 one for every 64 weights."""
    other = 4 if bits == 32 else 2
    scales = {8: sum(4 * rows for rows, _ in sizes.linears.values()), 4: sizes.parameters / 16}.get(bits, 0)
    masks = sizes.parameters if sizes.masked else 0
    return sizes.parameters * bits / 8 + scales + masks + sizes.others * other


def activation_bytes(sizes: ModelCost, bits: int) -> float:
    """Bytes of one window at the peak, without adapters: what the blocks keep for their backward pass, and the logits."""
    number = 4 if bits == 32 else 2
    logits = sizes.length * sizes.vocabulary * (LOGIT + (0 if bits == 32 else number))
    inputs = sum(columns for _, columns in sizes.linears.values()) if bits == 8 else 0  # int8 keeps the input of every linear
    return number * (sizes.num_blocks * sizes.saved + sizes.length * inputs) + logits


def memory(sizes: ModelCost, grid: SearchSpace, choice: ClientConfig) -> float:
    """Bytes at the peak of training, besides the program itself.

    A tuned linear keeps its input (in float32: adapters compute in it) and, for each rank, a number for each token.
    """
    rest = 4 * grid.rest * sum(map(sum, sizes.linears.values()))
    total = weight_bytes(sizes, choice.bits) + rest + choice.micro * activation_bytes(sizes, choice.bits)
    for name, rank in choice.ranks.items():
        if rank:
            rows, columns = sizes.linears[name]
            total += rank * (rows + columns) * PER_TUNED + choice.micro * sizes.length * 4 * (columns + rank)
    return total


def full_memory(sizes: ModelCost, micro: int) -> float:
    """Likewise, when the linears themselves are trained, in float32."""
    kept = sum(columns for _, columns in sizes.linears.values())
    tuned = sizes.parameters * (PER_TUNED - 4)
    return weight_bytes(sizes, 32) + tuned + micro * (activation_bytes(sizes, 32) + 4 * sizes.length * kept)


def window_operations(sizes: ModelCost, grid: SearchSpace) -> float:
    """Floating-point operations for one window, forwards and back, without trained adapters.

    Two for each weight and token on the way forwards and two on the way back (frozen weights have no gradient), the same
    for the head, and the attention's products. Under masks the product of the factors is a second linear, and its gradient
    a third.
    """
    tokens, weights = sizes.length, sizes.parameters + sizes.width * sizes.vocabulary
    attention = 2 * 2 * sizes.length**2 * sizes.width * sizes.num_blocks
    rest = 4 * tokens * grid.rest * sum(map(sum, sizes.linears.values()))
    if sizes.masked:
        rest = 6 * tokens * sizes.parameters + 8 * grid.rest * sizes.parameters
    return 4 * tokens * weights + 3 * attention + rest


def compute_seconds(sizes: ModelCost, grid: SearchSpace, budget: Budget, choice: ClientConfig) -> float:
    """Seconds of computing in a round."""
    adapters = sum(rank * sum(sizes.linears[name]) for name, rank in choice.ranks.items())
    windows = grid.steps * each_device(choice.batch, budget)
    return windows * (window_operations(sizes, grid) + 6 * sizes.length * adapters) / budget.speed


def each_device(batch: int, budget: Budget) -> int:
    """Windows of a step that the busiest device computes."""
    return -(-batch // budget.devices)


def seconds(sizes: ModelCost, grid: SearchSpace, budget: Budget, choice: ClientConfig) -> float:
    """Seconds of a round: computing, and sending the adapters."""
    return compute_seconds(sizes, grid, budget, choice) + upload(sizes, grid, choice) / budget.uplink


def full_compute_seconds(sizes: ModelCost, grid: SearchSpace, budget: Budget, batch: int) -> float:
    """Seconds of computing for whole linears: their gradient takes as much again as going back through them."""
    windows = grid.steps * each_device(batch, budget)
    return windows * (window_operations(sizes, grid) + 2 * sizes.length * sizes.parameters) / budget.speed


def upload(sizes: ModelCost, grid: SearchSpace, choice: ClientConfig) -> float:
    """Bytes that go up in a round."""
    return grid.number * sum(rank * sum(sizes.linears[name]) for name, rank in choice.ranks.items())


def gain(rank: float, largest: int) -> float:
    """What a rank is worth, between 0 and 1: concave, for each further direction of change is worth less."""
    return math.log2(1 + rank) / math.log2(1 + largest)


def value(sizes: ModelCost, grid: SearchSpace, importance: Mapping[str, float], choice: ClientConfig) -> float:
    """What a configuration is worth: Σ importance·gain(rank) + gain(batch) − the price of few bits − the price of bytes.

    The prices are ours. Without the last one a client with room would tune every linear at the largest rank, important or
    not, and send all of it; with a price of 1 a linear of mean importance stops at a middle rank.

    Args:
        importance: of each linear, not negative, together 1.
    """
    ranks = sum(importance[name] * gain(rank, grid.ranks[-1]) for name, rank in choice.ranks.items())
    sent = sum(rank * sum(sizes.linears[name]) for name, rank in choice.ranks.items()) / _largest(sizes, grid)
    return ranks + gain(choice.batch, grid.batches[-1]) - QUANTIZATION_PRICE[choice.bits] - grid.upload_price * sent


def _largest(sizes: ModelCost, grid: SearchSpace) -> float:
    return grid.ranks[-1] * sum(map(sum, sizes.linears.values()))


def least(sizes: ModelCost, grid: SearchSpace) -> ClientConfig:
    """The cheapest configuration: one linear, the smallest rank, one window, the fewest bits."""
    name = min(sizes.linears, key=lambda name: (sum(sizes.linears[name]), name))
    bits = min(grid.bits, key=lambda bits: weight_bytes(sizes, bits) + activation_bytes(sizes, bits))
    return ClientConfig(bits, grid.batches[0], 1, {name: grid.ranks[0]})


def check_feasible(sizes: ModelCost, grid: SearchSpace, budget: Budget) -> None:
    """Raises :class:`Infeasible` where even the cheapest configuration does not fit, with the smallest budget that would do."""
    choice = least(sizes, grid)
    needed = memory(sizes, grid, choice)
    if needed > budget.memory:
        raise Infeasible(
            f"the least that tunes anything needs {mebibytes(needed, enough=True)} of memory, but it has "
            f"{mebibytes(budget.memory)} (clients.memory); lower length, or allow fewer bits"
        )
    needed = seconds(sizes, grid, budget, choice)
    if needed > budget.seconds:
        raise Infeasible(f"the least that tunes anything takes {needed:.3g} s a round, but deadline is {budget.seconds:.3g} s")


def best(
    sizes: ModelCost, grid: SearchSpace, budget: Budget, importance: Mapping[str, float], gap: float | None = None
) -> ClientConfig:
    """The configuration of the highest :func:`value` within a budget, to within ``gap``.

    A quick search comes first (see :mod:`fedgrove.stages.tune.knapsack`); where it cannot prove that nothing is better by more
    than the gap, the answer is that of a mixed-integer linear program. Windows are computed one at once in both, which takes
    the least memory and is worth the same; :func:`widest` then uses what is left.

    Args:
        importance: of each linear, not negative, together 1.
        gap: how far from the optimum the answer may be, relative; default: 0.1 %, and 0.5 % where there are more than a
            thousand ranks to choose from, where the last tenths take most of the time.

    Raises:
        Infeasible: nothing fits.
    """
    check_feasible(sizes, grid, budget)
    names = sorted(sizes.linears)
    inputs, both = np.array([(sizes.linears[name][1], sum(sizes.linears[name])) for name in names], dtype=float).T
    numbers = np.outer(both, grid.ranks)  # that are trained and sent
    gains = [gain(rank, grid.ranks[-1]) for rank in grid.ranks]
    worth = np.outer([importance[name] for name in names], gains) - grid.upload_price / _largest(sizes, grid) * numbers
    trained = PER_TUNED * numbers + 4.0 * sizes.length * np.add.outer(inputs, grid.ranks)
    bits = [
        KnapsackSide(-QUANTIZATION_PRICE[b], trained, budget.memory - memory(sizes, grid, ClientConfig(b, 1, 1, {})))
        for b in grid.bits
    ]
    batches = []
    for batch in grid.batches:
        number = 6.0 * sizes.length * grid.steps * each_device(batch, budget) / budget.speed + grid.number / budget.uplink
        room = budget.seconds - seconds(sizes, grid, budget, ClientConfig(grid.bits[0], batch, 1, {}))
        batches.append(KnapsackSide(gain(batch, grid.batches[-1]), number * numbers, room))
    if gap is None:
        gap = 1e-3 if worth.size <= 1000 else 5e-3
    found = search(worth, bits, batches, gap)
    if found is None or found.bound - found.value > gap * abs(found.value):
        found = solve(worth, bits, batches, gap)
    chosen = {name: grid.ranks[place] for name, place in zip(names, found.ranks, strict=True) if place >= 0}
    return widest(sizes, grid, budget, ClientConfig(grid.bits[found.bits], grid.batches[found.batch], 1, chosen))


def solve(worth: Array, bits: Sequence[KnapsackSide], batches: Sequence[KnapsackSide], gap: float) -> Solution:
    """Likewise, by HiGHS; see :func:`fedgrove.stages.tune.knapsack.search`.

    One binary for each number of bits and each batch, one of each to be chosen; for each linear and each step up the ranks
    one more: a step is taken only after the one below it. Bytes × bits and seconds × batch would make products; they are
    linear once these are known, so each has a row of its own, slack when it is not chosen.

    Raises:
        Infeasible: nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # a third of a second and 20 MB, which other stages need not
    from scipy.sparse import csr_array

    num_bits = len(bits)
    first = num_bits + len(batches)  # the variables of linear i, step k: first + i * num_steps + k
    size = first + worth.size
    objective = np.concatenate([[side.worth for side in (*bits, *batches)], np.diff(worth, axis=1, prepend=0.0).ravel()])

    rows: list[Array] = []
    upper: list[float] = []
    lower: list[float] = []

    def row(ends: slice, number: float, tail: Array | float, low: float, high: float) -> None:
        values = np.zeros(size)
        values[ends], values[first:] = number, tail
        rows.append(values)
        lower.append(low)
        upper.append(high)

    row(slice(0, num_bits), 1.0, 0.0, 1.0, 1.0)
    row(slice(num_bits, first), 1.0, 0.0, 1.0, 1.0)
    for at, side in enumerate((*bits, *batches)):
        if side.room < 0:
            row(slice(at, at + 1), 1.0, 0.0, 0.0, 0.0)
            continue
        tail = np.diff(side.sizes, axis=1, prepend=0.0).ravel()
        slack = float(tail.sum()) - side.room
        if slack > 0:
            scale = max(side.room, float(tail.max()))
            row(slice(at, at + 1), slack / scale, tail / scale, -np.inf, (side.room + slack) / scale)
    something = np.zeros(worth.shape)
    something[:, 0] = 1.0
    row(slice(0), 0.0, something.ravel(), 1.0, np.inf)

    constraints = [LinearConstraint(csr_array(np.array(rows)), lower, upper)]
    ladder = np.arange(first, size).reshape(worth.shape)
    pairs = np.stack([ladder[:, :-1].ravel(), ladder[:, 1:].ravel()], 1)
    if len(pairs):
        at_row = np.repeat(np.arange(len(pairs)), 2)
        order = csr_array((np.tile([1.0, -1.0], len(pairs)), (at_row, pairs.ravel())), shape=(len(pairs), size))
        constraints.append(LinearConstraint(order, 0.0, np.inf))
    options = {"mip_rel_gap": gap}
    result = milp(-objective, constraints=constraints, integrality=np.ones(size), bounds=Bounds(0, 1), options=options)
    if result.x is None:
        raise Infeasible(f"no configuration fits its memory and its deadline together ({result.message.split('(')[0].strip()})")
    taken = result.x > 0.5
    ranks = taken[first:].reshape(worth.shape).sum(1) - 1
    at_bits, at_batch = int(taken[:num_bits].argmax()), int(taken[num_bits:first].argmax())
    return Solution(at_bits, at_batch, ranks, -float(result.fun), -float(result.mip_dual_bound))


def micros(batches: tuple[int, ...]) -> list[int]:
    """How many windows may be computed at once: one, or any batch."""
    return sorted({1, *batches})


def widest(
    sizes: ModelCost,
    grid: SearchSpace,
    budget: Budget,
    choice: ClientConfig,
    need: Callable[[ModelCost, SearchSpace, ClientConfig], float] = memory,
) -> ClientConfig:
    """The same configuration with as many windows at once as fit: fewer, larger products are faster.

    Args:
        need: bytes of a configuration.
    """
    fits = [micro for micro in micros(grid.batches) if micro <= each_device(choice.batch, budget)]
    fits = [m for m in fits if need(sizes, grid, ClientConfig(choice.bits, choice.batch, m, choice.ranks)) <= budget.memory]
    return ClientConfig(choice.bits, choice.batch, max([choice.micro, *fits]), choice.ranks)
