"""What pruning costs a client: memory, bytes and seconds, computed from the shapes of the model and not measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedgrove.input_statistics.fixed_point import ring_bits
from fedgrove.models.blocks import Decoder
from fedgrove.models.experts import expert_of
from fedgrove.models.linears import linears
from fedgrove.models.masks import Target
from fedgrove.rounds import wire
from fedgrove.rounds.capabilities import SPEED, Capabilities
from fedgrove.rounds.request import Disclosure
from fedgrove.stages.prune.calibration_pass import windows_at_once
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.fixed_weights import VALUE_BITS
from fedgrove.stages.prune.personal import OTHERS_WEIGHTS
from fedgrove.stages.prune.pruners import effort_of
from fedgrove.stages.prune.shared import num_outside_blocks


@dataclass(frozen=True)
class Cost:
    """What one block costs a client.

    Attributes:
        memory: bytes at the peak; upload: bytes sent; seconds: to compute and to send.
    """

    memory: int
    upload: int
    seconds: float


@dataclass(frozen=True)
class MaskedBytes:
    """Bytes of a number under secure aggregation, from the width of the ring.

    Attributes:
        votes: for each weight that a client prunes, with its vote.
        sums: for each sum over the inputs of linears.
    """

    votes: float
    sums: float


@dataclass(frozen=True)
class LargestBlock:
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


def largest_block(decoder: Decoder) -> LargestBlock:
    """Describes a model's largest block; reads no weights."""
    numbers = [sum(parameter.numel() for parameter in block.parameters()) for block in decoder.blocks]
    index = numbers.index(max(numbers))
    names = linears(decoder.blocks[index])
    config = decoder.checkpoint.config.get_text_config()
    shapes = {name: decoder.read_shape(f"{decoder.prefix}.{index}.{name}") for name in names}
    experts = {expert_of(name) for name in names} - {None}
    return LargestBlock(
        shapes=shapes,
        inputs=_inputs(shapes, config.hidden_size),
        reached={name: config.num_experts_per_tok / len(experts) if expert_of(name) else 1.0 for name in names},
        width=config.hidden_size,
        numel=max(numbers),
        ends=num_outside_blocks(decoder),
        dtype=decoder.checkpoint.spec(next(iter(decoder.block_names(0).values())))[1],
    )


def cost_of(block: LargestBlock, config: Config, capabilities: Capabilities, masked: MaskedBytes | None) -> Cost:
    """What pruning the largest block costs a client in a round, without the mending of votes.

    Args:
        masked: None without secure aggregation.
    """
    needs = config.solver.NEEDS
    shapes, inputs = list(block.shapes.values()), block.inputs
    parameters = sum(rows * columns for rows, columns in shapes)
    distinct = list(inputs.values())
    effort, widest = effort_of(config.pruner), max(distinct)
    samples = capabilities.samples or config.samples
    tokens = samples * config.length

    sums = {name: {"nothing": 0, "squares": w, "gram": w * w // 2, "moments": 3 * w}[needs] for name, w in inputs.items()}
    statistics = sum(sums.values()) + (3 * sum(distinct) if config.sums_moments else 0)
    together = windows_at_once(samples, config.length, config.compute_dtype) if config.method.SOLVED_AT == "client" else 1
    forward = _forward(block, config, tokens)
    gram = 2 * tokens * sum(number * block.reached[name] for name, number in sums.items())
    solve = effort.operations(shapes, distinct) if needs == "gram" else 0
    sparsity = target_of(config, capabilities).sparsity
    upload = sum(wire.estimate(rows * columns, sparsity, block.dtype) for rows, columns in shapes)
    if {Disclosure.MASKS} == config.method.SENDS:
        upload = parameters // 8
    if masked is not None:
        upload = math.ceil(parameters * masked.votes)
    if config.method.SOLVED_AT == "server":
        upload = _sum_bytes(3 * distinct if config.sums_moments else distinct, products_of(block, config), masked)
        if not config.personal:
            solve = 0  # the server prunes
    width = 2 if config.compute_dtype == "bfloat16" else 4
    gathering = 8 * statistics + width * (block.numel + together * _window(block, config))
    solving = _solving(block, config, statistics, widest if needs == "gram" else 0)
    if config.method.SOLVED_AT == "server":
        gathering = gathering + width * block.ends
        # the client's own sums and everybody's stay; of the input that is solved, their mix, and the upper half of its matrix
        solving = solving + 8 * (statistics + widest**2 * (needs == "gram")) if config.personal else 0
    if config.personal:  # it sums its text twice, prunes for every candidate, and measures each
        passes = config.windows_held_out(samples) / samples
        forward, gram, solve = (2 + len(OTHERS_WEIGHTS) * passes) * forward, 2 * gram, len(OTHERS_WEIGHTS) * solve
    memory = max(width * block.ends, gathering, solving) + 2 * upload + 2**24
    return Cost(int(memory), int(upload), _seconds(forward + gram + solve, upload, capabilities))


def server_memory(block: LargestBlock, config: Config, masked: MaskedBytes | None) -> int:
    """Bytes at the server's peak where it prunes the largest block by sums, however many clients there are.

    These are the sums of all clients as whole numbers, one client's reply as bytes and as numbers, the floats of the sums and
    what the pruner needs besides. Measured peaks of a server's process were 0.77 to 1.19 of it (docs/lab.md).
    """
    inputs, products = list(block.inputs.values()), products_of(block, config)
    sums = sum(inputs) * (3 if config.sums_moments else 1) + sum(width * (width - 1) // 2 for width in products)
    solving = _solving(block, config, sums, max(products, default=0))
    return 8 * sums + solving + 4 * block.numel + 2 * _sum_bytes(inputs, products, masked) + 2**24


def _solving(block: LargestBlock, config: Config, sums: int, widest: int) -> int:
    """Bytes while a block's linears are pruned: float64 sums, the pruner's own matrices, weights and masks.

    Args:
        widest: channels of the widest input whose products the pruner has; 0: of none.
    """
    effort, numbers = effort_of(config.pruner), [rows * columns for rows, columns in block.shapes.values()]
    matrices = 8 * (effort.squares * widest**2 // 2) + 4 * effort.matrices * max(numbers)
    return 8 * sums + matrices + sum(numbers) * (block.dtype.itemsize + 1)


def _forward(block: LargestBlock, config: Config, tokens: int) -> float:
    """Operations of the passes of a client's text through the block."""
    multiplied = sum(rows * columns * block.reached[name] for name, (rows, columns) in block.shapes.items())
    return (1 if config.calibration_source == "dense" else 2) * 2 * tokens * multiplied


def _window(block: LargestBlock, config: Config) -> int:
    """Numbers of one window's activations in the block."""
    return config.length * (6 * block.width + 4 * max(block.inputs.values()))


def _seconds(operations: float, upload: float, capabilities: Capabilities) -> float:
    sending = 8 * upload / capabilities.uplink if capabilities.uplink else 0.0
    return operations / (SPEED * capabilities.speed) + sending


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


def products_of(block: LargestBlock, config: Config) -> list[int]:
    """The widths of the inputs whose products Σ xᵢxⱼ are summed."""
    return [i for i in block.inputs.values() if config.sums_products and not (config.mixed and i > block.width)]


def mending_cost(block: LargestBlock, config: Config, capabilities: Capabilities, masked: MaskedBytes | None) -> Cost:
    """What the largest block costs a client once more when votes are mended, by sums over its inputs."""
    inputs = list(block.inputs.values())
    tokens = (capabilities.samples or config.samples) * config.length
    upload = _sum_bytes(3 * inputs, [], masked)
    width = 2 if config.compute_dtype == "bfloat16" else 4
    memory = 8 * 3 * sum(inputs) + width * (block.numel + _window(block, config) + block.ends) + 2 * upload + 2**24
    return Cost(int(memory), upload, _seconds(_forward(block, config, tokens), upload, capabilities))


def masked_bytes(config: Config, capabilities: Mapping[str, Capabilities]) -> MaskedBytes:
    """The widths of the rings in which secure aggregation adds these clients' responses."""
    tokens = sum(client.samples or config.samples for client in capabilities.values()) * config.length
    bits = VALUE_BITS if Disclosure.WEIGHTS in config.method.SENDS else 0
    return MaskedBytes(votes=(len(capabilities).bit_length() + bits) / 8, sums=ring_bits(tokens) / 8)


def _sum_bytes(inputs: Sequence[int], products: Sequence[int], masked: MaskedBytes | None) -> int:
    """Estimated bytes of one block's sums: an int64 compresses to 4.0 (measured on the shipped model); plus names."""
    numbers = sum(inputs) + sum(width * (width - 1) // 2 for width in products)
    return math.ceil((masked.sums if masked else 4.0) * numbers) + 500 * len(inputs)


def upload_by_pruner(block: LargestBlock, num_blocks: int, config: Config, masked: MaskedBytes | None) -> dict[str, int]:
    """Bytes that a client would upload with each pruner if the server prunes; else empty."""
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


def target_of(config: Config, capabilities: Capabilities) -> Target:
    """How sparse a client's own pruning is."""
    if config.pattern or capabilities.sparsity is None:
        return config.target
    return Target(capabilities.sparsity)
