"""What a configuration costs a client in memory, time and bytes, and the best configuration within its budget.

FedPipe (arXiv 2404.06448) chooses each client's batch size, ranks and bits with a mixed-integer linear program. The
text of the paper was not available. From the paper: such a program over these variables. Ours: the cost model, steps as a
variable, what a configuration is worth (:mod:`fedgrove.stages.tune.objective`) and the linear formulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fedgrove.models.cost import ModelCost
from fedgrove.quantities import mebibytes
from fedgrove.stages.tune.knapsack import Infeasible, KnapsackSide, search, solve
from fedgrove.stages.tune.objective import NOISE, pace

QUANTIZATION_PRICE = {32: 0.0, 16: 0.0, 8: 0.02, 4: 0.1}  # by bits: the part of a round's gain that they cost
STEP_PARTS = (1.0, 0.75, 0.5)  # of the steps that a client has time for without adapters
PER_TUNED = 16  # bytes of a trained number: itself, its gradient and Adam's two moments, all float32
Worth = Mapping[str, Sequence[float]]  # by linear, at each rank of the search space
LOGIT = 12  # bytes per logit at the peak, besides the logit: its float32 copy or probability, and two gradients


@dataclass(frozen=True)
class ClientConfig:
    """A client's configuration.

    Attributes:
        bits: of each frozen weight.
        batch: windows of an optimizer step.
        micro: windows computed at once on each device (the micro-batch).
        ranks: by linear; linears that are missing are not tuned.
        steps: optimizer steps of a round; None: those of the search space.
    """

    bits: int
    batch: int
    micro: int
    ranks: Mapping[str, int]
    steps: int | None = None


@dataclass(frozen=True)
class SearchSpace:
    """The configurations to choose from, and what is fixed for all of them.

    Attributes:
        bits: the allowed values, in any order.
        batches, ranks: the allowed values, ascending; rank 0 is always allowed.
        steps: optimizer steps per round.
        max_steps: the most that a client may get, and then each gets its own number; 0: all get ``steps``.
        rest: an upper bound on the rank of the change that a client computes with, in every linear, trained or not.
        number: bytes of one number of a factor on the wire.
        upload_price: of sending all linears at the largest rank; ranks whose gain is below their price are not chosen.
        noise: the noise scale in windows; see :mod:`fedgrove.stages.tune.objective`.
    """

    bits: tuple[int, ...]
    batches: tuple[int, ...]
    ranks: tuple[int, ...]
    steps: int
    rest: int = 0
    number: float = 1.27
    upload_price: float = 0.1
    max_steps: int = 0
    noise: float = NOISE


@dataclass(frozen=True)
class Budget:
    """What a client has available; memory, time and uplink are unlimited by default.

    Attributes:
        memory: bytes, of each device.
        seconds: per round.
        speed: floating-point operations per second, of each device.
        uplink: bytes per second.
        devices: number of devices that share the windows of a step.
    """

    memory: float = math.inf
    seconds: float = math.inf
    speed: float = 3e10
    uplink: float = math.inf
    devices: int = 1


def weight_bytes(cost: ModelCost, bits: int) -> float:
    """Bytes of the frozen model, including scales: one per row for int8, one per 64 weights for NF4."""
    other = 4 if bits == 32 else 2
    scales = {8: sum(4 * rows for rows, _ in cost.linears.values()), 4: cost.parameters / 16}.get(bits, 0)
    masks = cost.parameters if cost.masked else 0
    return cost.parameters * bits / 8 + scales + masks + cost.others * other


def working_bytes(cost: ModelCost, bits: int, windows: int, masked: bool = False) -> float:
    """Bytes taken for a moment, while all activations are saved: by logits or by one linear, whichever takes more.

    In the forward pass a linear's adapter takes its product and the product times the scale, in float32. In the backward pass
    a quantized weight is written out in bfloat16. On a CPU int8 also takes two float32 copies of it, to multiply it by its
    rows' scales. Where the product of the factors is masked, there are in float32 the weight's gradient, the product, and a
    copy of the mask or of the weight.

    Args:
        windows: computed at once.
        masked: whether the product of the factors is masked.
    """
    largest = max((rows * columns for rows, columns in cost.linears.values()), default=0)
    weight = largest * (12 if masked else {8: 2 + 4 + 4, 4: 2}.get(bits, 0))
    widest = max((rows for rows, _ in cost.linears.values()), default=0)
    products = 0 if masked else windows * cost.length * widest * 2 * 4
    return max(weight, products, logit_bytes(cost, bits))


def logit_bytes(cost: ModelCost, bits: int) -> float:
    """Bytes of logits, and of what their loss takes besides, at the peak."""
    return cost.logits * (LOGIT + (0 if bits == 32 else 2))


def activation_bytes(cost: ModelCost, bits: int, windows: int) -> float:
    """Bytes of the activations that all blocks save of some windows, without adapters."""
    number, saved = (4, 4 * cost.saved) if bits == 32 else (2, cost.saved_half)
    inputs = _inputs(cost) if bits == 8 else 0  # int8 saves the input of every linear
    return windows * (cost.num_blocks * saved + number * cost.length * (inputs + cost.width))


def memory(cost: ModelCost, space: SearchSpace, config: ClientConfig) -> float:
    """Bytes at the peak of training, without the process itself and without what the C library keeps of freed memory."""
    rest = 4 * space.rest * cost.widths
    total = weight_bytes(cost, config.bits) + rest + working_bytes(cost, config.bits, config.micro, cost.masked)
    total += activation_bytes(cost, config.bits, config.micro)
    for name, rank in config.ranks.items():
        if rank:
            rows, columns = cost.linears[name]
            saved = cost.uses(name) * _saved_bytes(cost, config.bits, columns, rank)
            total += rank * (rows + columns) * PER_TUNED + config.micro * saved
    return total


def _inputs(cost: ModelCost) -> float:
    """The numbers of a token that linears read in a forward pass."""
    return sum((cost.uses(name) * columns for name, (_, columns) in cost.linears.items()), 0.0)


def _saved_bytes(cost: ModelCost, bits: int, columns: Any, rank: Any) -> Any:
    """Bytes that one use of a tuned linear saves of one window for the backward pass; of numbers, or of arrays of them.

    Its input in float32 (the dtype of the adapters) and, per token, one number for each rank; on a pruned model only its
    input, in the dtype of the weights.
    """
    if cost.masked:
        return (4 if bits == 32 else 2) * cost.length * columns
    return 4 * cost.length * (columns + rank)


def full_memory(cost: ModelCost, micro: int, per_weight: int = PER_TUNED) -> float:
    """Bytes at the peak where every weight of the linears has a gradient, in float32, without the process itself.

    Args:
        per_weight: bytes of a weight, with its gradient and what an optimizer keeps.
    """
    inputs = _inputs(cost)
    tuned = cost.parameters * (per_weight - 4)
    saved = activation_bytes(cost, 32, micro) + micro * 4 * cost.length * inputs
    return weight_bytes(cost, 32) + tuned + saved + logit_bytes(cost, 32)


def window_operations(cost: ModelCost) -> float:
    """Floating-point operations of one window's forward and backward pass through the frozen model.

    Two per weight and token in the forward pass and two in the backward pass (frozen weights need no gradient), the
    same for the head, plus the attention products.
    """
    weights = cost.multiplied + cost.width * cost.vocabulary
    attention = 2 * 2 * cost.length**2 * cost.width * cost.num_blocks
    return 4 * cost.length * weights + 3 * attention


def compute_seconds(cost: ModelCost, space: SearchSpace, budget: Budget, config: ClientConfig) -> float:
    """Seconds of computation in a round of LoRA.

    Per number and token, factors that are trained take six operations and those that are not take four; of a linear's ``rest``
    terms a client trains the first. On a pruned model the product of the factors that are not trained is added to the weight
    instead (eight operations per weight and rank in both passes), and the weight's gradient takes two operations per weight
    and token; a quantized weight, to which nothing can be added, takes four more, which are not counted.
    """
    adapters = sum(cost.uses(name) * rank * sum(cost.linears[name]) for name, rank in config.ranks.items())
    if cost.masked:
        rest = (2 * cost.length + 8 * space.rest) * cost.multiplied
    else:
        rest = 4 * cost.length * space.rest * cost.used_widths
    windows = (config.steps or space.steps) * each_device(config.batch, budget)
    return windows * (window_operations(cost) + rest + _for_each_trained(cost, space) * adapters) / budget.speed


def _for_each_trained(cost: ModelCost, space: SearchSpace) -> float:
    """Operations of a window for each number of the factors that is trained, on top of those if nothing is."""
    instead = 4 if space.rest and not cost.masked else 0  # it is then no longer one of the rest
    return (6.0 - instead) * cost.length


def each_device(batch: int, budget: Budget) -> int:
    """Windows of a step on the device that computes the most of them."""
    return -(-batch // budget.devices)


def seconds(cost: ModelCost, space: SearchSpace, budget: Budget, config: ClientConfig) -> float:
    """Seconds of a round: computation, and upload of the adapters."""
    return compute_seconds(cost, space, budget, config) + upload(cost, space, config) / budget.uplink


def full_compute_seconds(cost: ModelCost, space: SearchSpace, budget: Budget, batch: int) -> float:
    """Seconds of computation in a round of full fine-tuning."""
    return space.steps * each_device(batch, budget) * full_operations(cost) / budget.speed


def full_operations(cost: ModelCost) -> float:
    """:func:`window_operations` with the weights' gradients, which take two more per weight and token."""
    return window_operations(cost) + 2 * cost.length * cost.multiplied


def upload(cost: ModelCost, space: SearchSpace, config: ClientConfig) -> float:
    """Bytes uploaded in a round."""
    return space.number * sum(rank * sum(cost.linears[name]) for name, rank in config.ranks.items())


def value(cost: ModelCost, space: SearchSpace, worth: Worth, config: ClientConfig) -> float:
    """The objective: ln pace(steps, batch) + Σ worth(rank) − quantization price − upload price.

    To first order the logarithm of what a round gains, so that prices are parts of a round's gain. Without the upload price
    a client with a large budget would tune every linear at the largest rank, important or not, and upload all of it.

    Args:
        worth: of each linear at each rank, see :meth:`fedgrove.stages.tune.objective.Gradients.worth`.
    """
    ranks = sum(worth[name][space.ranks.index(rank)] for name, rank in config.ranks.items() if rank)
    sent = sum(rank * sum(cost.linears[name]) for name, rank in config.ranks.items()) / _largest(cost, space)
    steps = math.log(pace(config.steps or space.steps, config.batch, space.noise))
    return steps + ranks - QUANTIZATION_PRICE[config.bits] - space.upload_price * sent


def _largest(cost: ModelCost, space: SearchSpace) -> float:
    return space.ranks[-1] * cost.widths


def least(cost: ModelCost, space: SearchSpace) -> ClientConfig:
    """The cheapest configuration: the smallest of everything, one window at once, the bits that need least memory."""
    name = min(cost.linears, key=lambda name: (sum(cost.linears[name]), name))
    config = ClientConfig(0, space.batches[0], 1, {name: space.ranks[0]}, 1 if space.max_steps else None)
    return min((replace(config, bits=bits) for bits in space.bits), key=partial(memory, cost, space))


def check_feasible(cost: ModelCost, space: SearchSpace, budget: Budget) -> None:
    """Checks that the cheapest configuration fits.

    Raises:
        Infeasible: it does not; names the smallest budget that would be enough.
    """
    config = least(cost, space)
    needed = memory(cost, space, config)
    if needed > budget.memory:
        raise Infeasible(
            f"the smallest configuration needs {mebibytes(needed, enough=True)} of memory, but it has "
            f"{mebibytes(budget.memory)} (clients.memory); lower length, or allow fewer bits"
        )
    needed = seconds(cost, space, budget, config)
    if needed > budget.seconds:
        raise Infeasible(
            f"the smallest configuration takes {needed:.3g} s a round, but deadline is {budget.seconds:.3g} s; raise deadline"
        )


def best(cost: ModelCost, space: SearchSpace, budget: Budget, worth: Worth, gap: float | None = None) -> ClientConfig:
    """The configuration with the highest :func:`value` within a budget, up to a gap.

    A fast search is tried first (see :mod:`fedgrove.stages.tune.knapsack`). If it cannot prove that its result is within the
    gap, a mixed-integer linear program is solved. Both assume one window at once, which takes the least memory and has the same
    value; :func:`widest` then uses the remaining memory. Of the numbers of steps only some are tried; the time that is left is
    used for more steps afterwards.

    Args:
        worth: of each linear at each rank, see :meth:`fedgrove.stages.tune.objective.Gradients.worth`.
        gap: the allowed distance to the optimum, as a part of a round's gain; default: 0.2 %, or 1 % for more than a thousand
            pairs of linear and rank, because closing the last tenths takes most of the time.

    Raises:
        Infeasible: no configuration fits.
    """
    check_feasible(cost, space, budget)
    names = sorted(cost.linears)
    inputs, widths = np.array([(cost.linears[name][1], sum(cost.linears[name])) for name in names], dtype=float).T
    uses = np.array([[float(cost.uses(name))] for name in names])
    numbers = np.outer(widths, space.ranks)  # trained and sent
    prices = space.upload_price / _largest(cost, space) * numbers
    values = np.array([worth[name] for name in names]) - prices
    bits = [
        KnapsackSide(
            -QUANTIZATION_PRICE[b],
            PER_TUNED * numbers + uses * _saved_bytes(cost, b, inputs[:, None], np.array(space.ranks, dtype=float)),
            budget.memory - memory(cost, space, ClientConfig(b, 1, 1, {})),
        )
        for b in space.bits
    ]
    choices, paces = _paces(cost, space, budget), []
    for batch, steps, one in choices:
        per_use = _for_each_trained(cost, space) * steps * each_device(batch, budget) / budget.speed
        per_number = per_use * uses + space.number / budget.uplink
        paces.append(
            KnapsackSide(math.log(pace(steps, batch, space.noise)), per_number * numbers, budget.seconds - steps * one)
        )
    if gap is None:
        gap = 2e-3 if values.size <= 1000 else 1e-2
    solution = search(values, bits, paces, gap)
    if solution is None or solution.bound - solution.value > gap:
        solution = solve(values, bits, paces, gap)
    ranks = {name: space.ranks[index] for name, index in zip(names, solution.ranks, strict=True) if index >= 0}
    batch, steps, _ = choices[solution.batch]
    config = ClientConfig(space.bits[solution.bits], batch, 1, ranks, steps)
    if space.max_steps:
        one = compute_seconds(cost, space, budget, replace(config, steps=1))
        left = budget.seconds - upload(cost, space, config) / budget.uplink
        config = replace(config, steps=max(steps, _most_steps(space, left, one)))
    return widest(cost, space, budget, config)


def _paces(cost: ModelCost, space: SearchSpace, budget: Budget) -> list[tuple[int, int, float]]:
    """Batch, steps and seconds of a step without adapters to choose from; with ``max_steps``, parts of the steps that fit."""
    choices, window = [], compute_seconds(cost, space, budget, ClientConfig(space.bits[0], 1, 1, {}, 1))
    for batch in space.batches:
        one = window * each_device(batch, budget)
        most = _most_steps(space, budget.seconds, one)
        parts = {math.ceil(part * most) for part in STEP_PARTS} - {0} if space.max_steps else {space.steps}
        choices += [(batch, steps, one) for steps in sorted(parts, reverse=True)]
    return choices


def _most_steps(space: SearchSpace, left: float, one: float) -> int:
    """How many steps of so many seconds each fit into the seconds that are left."""
    return space.max_steps if left >= space.max_steps * one else int(left / one)


def micros(batches: tuple[int, ...]) -> list[int]:
    """The sizes of micro-batches to choose from: 1, and every batch."""
    return sorted({1, *batches})


def widest(
    cost: ModelCost,
    space: SearchSpace,
    budget: Budget,
    config: ClientConfig,
    need: Callable[[ModelCost, SearchSpace, ClientConfig], float] = memory,
) -> ClientConfig:
    """The same configuration with the largest micro-batch that fits: fewer, larger matrix products are faster.

    Args:
        need: the bytes that a configuration needs.
    """
    fits = [micro for micro in micros(space.batches) if micro <= each_device(config.batch, budget)]
    fits = [m for m in fits if need(cost, space, ClientConfig(config.bits, config.batch, m, config.ranks)) <= budget.memory]
    return replace(config, micro=max([config.micro, *fits]))
