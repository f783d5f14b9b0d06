"""The plan of a stage that prunes: who does what, decided before the first round. The same input gives the same plan."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.exchange import disclosed_by
from fedgrove.input_statistics.fixed_point import ring_bits
from fedgrove.input_statistics.statistics import StatisticsKind
from fedgrove.models.blocks import Decoder, linears
from fedgrove.models.experts import expert_of
from fedgrove.models.masks import Target
from fedgrove.privacy import release
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.quantities import mebibytes
from fedgrove.rounds import wire
from fedgrove.rounds.capabilities import SPEED, Capabilities
from fedgrove.rounds.request import Disclosure
from fedgrove.stages import base
from fedgrove.stages.prune.calibration_pass import windows_at_once
from fedgrove.stages.prune.config import Config, LayerSampling
from fedgrove.stages.prune.exchanges.alone import EvaluateAlone
from fedgrove.stages.prune.exchanges.outliers import MeasureBlocks
from fedgrove.stages.prune.fixed_weights import VALUE_BITS
from fedgrove.stages.prune.pruners import effort_of


class Assignment(base.Assignment):
    """One client's part.

    Attributes:
        blocks: for each round, the blocks that the client is assigned.
        weight: its weight in the sum: the inverse of the probability that it is assigned a block.
        samples: windows that it calibrates on.
        sparsity: the sparsity that it prunes to.
    """

    blocks: list[list[int]]
    weight: float
    samples: int
    sparsity: float


class Plan(base.Plan):
    """The plan of a stage that prunes.

    Attributes:
        sums: whether clients send sums over their text and the server prunes.
        choices: bytes that a client would upload with each pruner if the server prunes; else empty.
    """

    kind: Literal["prune"] = "prune"
    clients: dict[str, Assignment]
    sums: bool
    num_blocks: int
    choices: dict[str, int]

    def contributors(self, round_: int, block: int) -> list[str]:
        """The names of the clients that are assigned a block in a round, sorted."""
        return sorted(name for name, assignment in self.clients.items() if block in assignment.blocks[round_])


def make_plan(
    index: int,
    config: Config,
    decoder: Decoder,
    capabilities: Mapping[str, Capabilities],
    seed: int,
    secure: bool = False,
    alone: bool = False,
) -> Plan:
    """Plans a pruning stage: which blocks each client prunes, and what this costs it.

    With layer sampling, a client's number of blocks is proportional to the number that it can prune and upload per second, so
    that all clients finish at about the same time; every block is assigned to at least ``cover`` clients. Each client's blocks
    are drawn anew for every round. Without layer sampling, every client prunes every block.

    Args:
        index: the stage's place in the job.
        capabilities: the clients' capabilities, by name.
        seed: the job's seed.
        secure: whether responses are masked under secure aggregation; masked responses do not compress.
        alone: whether the model that each client would have without the others is measured too.

    Raises:
        FedgroveError: the pattern does not fit a linear, or a client has too little memory; names the linear or the client.
    """
    check_pattern(decoder, config.target)
    needs = config.solver.NEEDS
    num_blocks = len(decoder)
    masked = _masked_bytes(config, capabilities) if secure else None
    largest = _largest(decoder)
    costs = {name: _cost(largest, config, client, needs, masked) for name, client in capabilities.items()}
    for name, client in sorted(capabilities.items()):
        if client.memory is not None and costs[name].memory > client.memory:
            raise FedgroveError(
                f"one block needs {mebibytes(costs[name].memory)} of memory, but the client has "
                f"{mebibytes(client.memory)} (clients.memory)",
                'lower length, use pruner "wanda", or leave the client out',
                client=name,
            )
    if isinstance(config.layers, LayerSampling):
        pace = {name: 1 / costs[name].seconds for name in capabilities}
        counts = share_blocks(pace, num_blocks, config.layers.sample, config.layers.cover)
        rounds = [draw_blocks(counts, num_blocks, f"{seed}/{index}/{round_}/layers") for round_ in range(config.rounds)]
    else:
        counts = dict.fromkeys(capabilities, num_blocks)
        rounds = [{name: list(range(num_blocks)) for name in capabilities} for _ in range(config.rounds)]

    assignments = {}
    first = 1 if config.protect_first_block else 0  # no client gets requests for the blocks before it
    for name in sorted(capabilities):
        blocks = [[block for block in drawn[name] if block >= first] for drawn in rounds]
        asked = sum(len(numbers) for numbers in blocks)
        assignments[name] = Assignment(
            blocks=blocks,
            weight=num_blocks / counts[name],
            samples=capabilities[name].samples or config.samples,
            sparsity=_target_of(config, capabilities[name]).sparsity,
            memory=costs[name].memory,
            upload=asked * costs[name].upload,
            seconds=round(asked * costs[name].seconds, 1),
        )
    return Plan(
        stage=index,
        sums=config.method.SOLVED_AT == "server",
        num_blocks=num_blocks,
        clients=assignments,
        choices=_choices(largest, num_blocks, config, masked),
        discloses=base.names_of(_discloses(config, bool(_products(largest, config, needs)), alone)),
        notes=tuple(_notes(config, secure, assignments, _products(largest, config, needs))),
    )


def share_blocks(pace: Mapping[str, float], num_blocks: int, sample: float, cover: int) -> dict[str, int]:
    """The number of blocks that each client is assigned: proportional to its pace, at least one, at most all.

    Together, the clients are assigned the fraction ``sample`` of all client-block pairs, or more if ``cover`` clients per block
    require it.

    Args:
        pace: blocks per second, by client.
        sample: the mean fraction of the blocks that a client is assigned, 0 < sample ≤ 1.
        cover: the smallest number of clients per block; at most the number of clients.
    """
    total = max(math.floor(sample * num_blocks * len(pace) + 0.5), cover * num_blocks, len(pace))
    exact: dict[str, float] = {}
    free = dict(pace)
    while free:  # clients over ``num_blocks`` or under 1 get exactly that; the remainder is divided again among the others
        rest = total - sum(exact.values())
        scaled = {name: rest * speed / sum(free.values()) for name, speed in free.items()}
        over = {name for name, number in scaled.items() if number > num_blocks}
        fixed = over or {name for name, number in scaled.items() if number < 1}
        if not fixed:
            exact |= scaled
            break
        for name in fixed:
            exact[name] = num_blocks if over else 1
            del free[name]
    counts = {name: math.floor(number + 1e-9) for name, number in exact.items()}
    by_remainder = sorted(counts, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder:
        if sum(counts.values()) >= total:
            break
        if counts[name] < num_blocks:
            counts[name] += 1
    return counts


def draw_blocks(counts: Mapping[str, int], num_blocks: int, seed: str) -> dict[str, list[int]]:
    """Draws the blocks of each client: clients, in shuffled order, take the next blocks of one shuffled, cyclic list.

    Every client gets ``counts[name]`` different blocks, each block with probability counts/num_blocks, and the numbers of
    clients of any two blocks differ by at most one. (Independent draws, as in an unofficial implementation of the paper, can
    leave blocks without any client.)

    Args:
        counts: number of blocks, by client; at most ``num_blocks``.
        seed: the same seed gives the same assignment.

    Returns:
        The block numbers of each client, ascending.
    """
    rng = random.Random(seed)
    blocks = list(range(num_blocks))
    names = sorted(counts)
    rng.shuffle(blocks)
    rng.shuffle(names)
    dealt, at = {}, 0
    for name in names:
        dealt[name] = sorted(blocks[(at + i) % num_blocks] for i in range(counts[name]))
        at += counts[name]
    return dealt


def check_pattern(decoder: Decoder, target: Target) -> None:
    """Refuses an N:M pattern if M does not divide every linear's number of inputs.

    Raises:
        FedgroveError: names the first linear that does not fit.
    """
    if target.pattern:
        for name in decoder.linear_names():
            num_in = decoder.read_shape(name)[1]
            if num_in % target.pattern[1]:
                raise FedgroveError(
                    f'pattern "{target}": {name} has {num_in} inputs, not a multiple of {target.pattern[1]}',
                    "choose another pattern or a sparsity",
                )


@dataclass(frozen=True)
class _Cost:
    memory: int
    upload: int  # bytes for one block
    seconds: float  # for one block


@dataclass(frozen=True)
class _Block:
    """What a plan needs to know about a model: its largest block (some may have experts), and the size of its ends.

    Attributes:
        shapes: (out, in) of every linear.
        inputs: the widths of the different inputs, by the name of a linear that reads each.
        reached: the fraction of the tokens that reaches each linear, if the router uses all experts equally.
        width: the width of the hidden states.
        numel: number of parameters of the block; ends: number of parameters outside all blocks.
        dtype: the dtype of the checkpoint's linears.
    """

    shapes: dict[str, tuple[int, int]]
    inputs: dict[str, int]
    reached: dict[str, float]
    width: int
    numel: int
    ends: int
    dtype: torch.dtype


def _largest(decoder: Decoder) -> _Block:
    numbers = [sum(parameter.numel() for parameter in block.parameters()) for block in decoder.blocks]
    index = numbers.index(max(numbers))
    names = linears(decoder.blocks[index])
    config = decoder.checkpoint.config.get_text_config()
    shapes = {name: decoder.read_shape(f"{decoder.prefix}.{index}.{name}") for name in names}
    experts = {expert_of(name) for name in names} - {None}
    everything = sum(decoder.checkpoint.spec(name)[0].numel() for name in decoder.checkpoint.names())
    return _Block(
        shapes=shapes,
        inputs=_inputs(shapes, config.hidden_size),
        reached={name: config.num_experts_per_tok / len(experts) if expert_of(name) else 1.0 for name in names},
        width=config.hidden_size,
        numel=max(numbers),
        ends=everything - sum(numbers),
        dtype=decoder.checkpoint.spec(next(iter(decoder.block_names(0).values())))[1],
    )


def _cost(block: _Block, config: Config, capabilities: Capabilities, needs: StatisticsKind, masked: float | None) -> _Cost:
    """What the largest block costs a client, computed from its shapes, not measured."""
    shapes, inputs = list(block.shapes.values()), block.inputs
    parameters = sum(rows * columns for rows, columns in shapes)
    distinct = list(inputs.values())
    effort, widest = effort_of(config.pruner), max(distinct)
    samples = capabilities.samples or config.samples
    tokens = samples * config.length

    sums = {name: {"nothing": 0, "squares": w, "gram": w * w // 2, "moments": 3 * w}[needs] for name, w in inputs.items()}
    statistics = sum(sums.values())
    workspace = effort.squares * widest**2 // 2 if needs == "gram" else 0  # in float32
    largest = max(rows * columns for rows, columns in shapes)
    together = windows_at_once(samples, config.length, config.compute_dtype) if config.method.SOLVED_AT == "client" else 1
    window = together * config.length * (6 * block.width + 4 * widest)

    multiplied = sum(rows * columns * block.reached[name] for name, (rows, columns) in block.shapes.items())
    forward = (1 if config.calibration_source == "dense" else 2) * 2 * tokens * multiplied
    gram = 2 * tokens * sum(number * block.reached[name] for name, number in sums.items())
    solve = effort.operations(shapes, distinct) if needs == "gram" else 0
    sparsity = _target_of(config, capabilities).sparsity
    upload = sum(wire.estimate(rows * columns, sparsity, block.dtype) for rows, columns in shapes)
    if {Disclosure.MASKS} == config.method.SENDS:
        upload = parameters // 8
    if masked is not None:
        upload = math.ceil(parameters * masked)
    if config.method.SOLVED_AT == "server":
        upload = _sum_bytes(
            distinct if needs != "moments" else 3 * distinct,
            _products(block, config, needs),
            masked,
        )
        workspace = solve = 0  # the server prunes
    width = 2 if config.compute_dtype == "bfloat16" else 4
    gathering = 8 * statistics + width * (block.numel + window)
    solving = (
        8 * (statistics + workspace) + 4 * effort.matrices * largest + parameters * (block.dtype.itemsize + 1)
    )  # weights and mask
    if config.method.SOLVED_AT == "server":
        gathering, solving = gathering + width * block.ends, 0
    memory = max(width * block.ends, gathering, solving) + 2 * upload + 2**24
    seconds = (forward + gram + solve) / (SPEED * capabilities.speed) + (
        8 * upload / capabilities.uplink if capabilities.uplink else 0.0
    )
    return _Cost(memory=int(memory), upload=int(upload), seconds=seconds)


def _inputs(shapes: Mapping[str, tuple[int, int]], width: int) -> dict[str, int]:
    """The widths of a block's different inputs, by the name of a linear that reads each.

    Inputs of the hidden states' width: at most three for the linears that all tokens reach, and one for each expert.
    """
    distinct: dict[str, int] = {}
    of_stream: Counter[str | None] = Counter()
    for name, (_, columns) in shapes.items():
        expert = expert_of(name)
        if columns != width or of_stream[expert] < (1 if expert else 3):
            distinct[name] = columns
            of_stream[expert] += columns == width
    return distinct


def _products(block: _Block, config: Config, needs: StatisticsKind) -> list[int]:
    """The widths of the inputs whose products Σ xᵢxⱼ are summed."""
    return [i for i in block.inputs.values() if needs == "gram" and not (config.mixed and i > block.width)]


def _masked_bytes(config: Config, capabilities: Mapping[str, Capabilities]) -> float:
    """Bytes per number of a masked response, or per weight and vote if clients prune: the width of the ring."""
    if config.method.SOLVED_AT == "server":
        return ring_bits(sum(client.samples or config.samples for client in capabilities.values()) * config.length) / 8
    return (len(capabilities).bit_length() + (VALUE_BITS if Disclosure.WEIGHTS in config.method.SENDS else 0)) / 8


def _sum_bytes(inputs: Sequence[int], products: Sequence[int], masked: float | None) -> int:
    """Estimated bytes of one block's sums: an int64 compresses to 4.0 (measured on the shipped model); plus names."""
    numbers = sum(inputs) + sum(width * (width - 1) // 2 for width in products)
    return math.ceil((masked or 4.0) * numbers) + 500 * len(inputs)


def _choices(block: _Block, num_blocks: int, config: Config, masked: float | None) -> dict[str, int]:
    if config.method.SOLVED_AT == "client":
        return {}
    inputs = list(block.inputs.values())
    number = num_blocks - config.protect_first_block
    return {
        "wanda": number * _sum_bytes(inputs, [], masked),
        "dsnot": number * _sum_bytes(3 * inputs, [], masked),
        "sparsegpt, mixed": number * _sum_bytes(inputs, [i for i in inputs if i <= block.width], masked),
        "sparsegpt": number * _sum_bytes(inputs, inputs, masked),
    }


def _discloses(config: Config, products: bool, alone: bool) -> frozenset[Disclosure]:
    """What a client's responses reveal about its text, over the whole stage."""
    if config.method.SOLVED_AT == "server":
        disclosed = disclosed_by(products, config.solver.NEEDS == "moments")
    else:
        disclosed = config.method.SENDS
        if config.measures_blocks:
            disclosed |= MeasureBlocks.DISCLOSES
    return disclosed | (EvaluateAlone.DISCLOSES if alone else frozenset())


def _notes(config: Config, secure: bool, assignments: Mapping[str, Assignment], products: Sequence[int]) -> list[str]:
    if config.method.SOLVED_AT == "client":
        if not config.measures_blocks:
            return []
        return ["Before anything is pruned, every client runs the whole model once and sends one number for each block."]
    if config.epsilon is not None:
        return [release.statistics_statement(config.epsilon, config.delta, config.length, min_survivors(len(assignments)))]
    widest = max(products, default=0)
    few = sum(assignment.samples * config.length < widest for assignment in assignments.values())
    spans = (
        f"{few} of {len(assignments)} clients send products of inputs with {widest} channels, summed over fewer tokens than "
        "channels. Such products reveal the subspace that the inputs span. Raise samples, set mixed = true, or use secure "
        "aggregation."
    )
    notes = [spans] if few and not secure else []
    if config.protect_first_block:
        return notes
    of = "the word counts of all clients together" if secure else "a client's word counts"
    return [
        *notes,
        f"The inputs of block 0 depend mainly on how often each token occurs, so their sums reveal much about {of}. "
        "With protect_first_block = true, block 0 is pruned by magnitude and no client sends its sums.",
    ]


def _target_of(config: Config, capabilities: Capabilities) -> Target:
    if config.pattern or capabilities.sparsity is None:
        return config.target
    return Target(capabilities.sparsity)
