"""Pruning by sums over everybody's text: the clients sum, the server prunes with the totals, exactly as if all text lay in one
place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove.client.hidden_states import Calibration
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.experts import expert_of
from fedgrove.models.masks import Target
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Message
from fedgrove.stages.base import calibration_seed
from fedgrove.stages.prune import pruners
from fedgrove.stages.prune.aggregation import pooled as statistics
from fedgrove.stages.prune.calibration_pass import shared_inputs
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.exchanges.block import START
from fedgrove.stages.prune.exchanges.statistics import SCALE, InputSums, Noise, SumInputs, largest_per_client
from fedgrove.stages.prune.input_statistics import InputStatistics
from fedgrove.stages.prune.plan import Plan
from fedgrove.stages.prune.pruners import magnitude

PROBE = 512  # random tokens at most that the model is run over to see how large its inputs are
CLIP_FACTOR = 1.5  # with noise, a window's Σ x² is clipped at this many times the norm that random tokens have


@dataclass(frozen=True)
class Pruned:
    """What was made of a linear: weight and mask (out, in), who contributed, and how far clients' masks agreed."""

    weight: Tensor
    mask: Tensor
    clients: list[str]
    agreement: float | None = None


@dataclass(frozen=True)
class SharedInput:
    """An input that one or several linears of a block read.

    Attributes:
        consumers: the linears; the first gives the input its name.
        scale: (in,) what clients multiply by, see :func:`fedgrove.stages.prune.aggregation.pooled.scale_of`.
        products: whether Σ xᵢxⱼ is asked for, besides Σ x².
        norm: what a window's Σ x² is clipped to where it is to be differentially private.
    """

    consumers: list[str]
    scale: Tensor
    products: bool
    norm: float


def probe(decoder: Decoder, stage: Config, seed: int) -> list[dict[str, SharedInput]]:
    """The inputs of every block and how large they are: one pass over random tokens, nobody's text.

    Returns:
        For each block its inputs by name.
    """
    vocabulary = decoder.checkpoint.config.get_text_config().vocab_size
    length = min(stage.length, PROBE)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (1, length), generator=generator)
    hidden, calls = decoder.embed(ids)
    width = hidden.shape[-1]
    blocks = []
    for index in range(len(decoder)):
        with decoder.loaded(index) as block, shared_inputs(block, lambda name: InputStatistics("squares")) as inputs:
            hidden = decoder.run(block, hidden, calls[index])
        consumers: dict[int, list[str]] = {}
        for name, shared in inputs.items():
            consumers.setdefault(id(shared), []).append(name)
        inputs_of_block = {}
        for names in consumers.values():
            seen = _seen(names[0], inputs)
            scale = statistics.scale_of(seen).cpu()
            norm = CLIP_FACTOR * stage.length / length * float((seen.squares.cpu() * scale.square()).norm())
            inputs_of_block[names[0]] = SharedInput(names, scale, _wants_products(stage, len(scale), width), norm)
        blocks.append(inputs_of_block)
    return blocks


def _seen(first: str, inputs: Mapping[str, InputStatistics]) -> InputStatistics:
    """What random tokens showed of an input; where none reached an expert, what they showed of another's like it."""
    if inputs[first].silent and expert_of(first):
        leaf = first.rpartition(".")[2]
        alike = (sums for name, sums in inputs.items() if expert_of(name) and name.rpartition(".")[2] == leaf)
        return next((sums for sums in alike if not sums.silent), inputs[first])
    return inputs[first]


def _wants_products(stage: Config, num_in: int, width: int) -> bool:
    return stage.solver.NEEDS == "gram" and not (stage.mixed and num_in > width)


def wants_moments(stage: Config) -> bool:
    """Whether the pruner needs means and variances."""
    return stage.solver.NEEDS == "moments"


def prune_without_data(decoder: Decoder, block: int, target: Target) -> dict[str, Pruned]:
    """Prunes a block by magnitude: nobody is asked anything."""
    records = {}
    for name in decoder.block_names(block):
        before = decoder.read_linear(block, name)
        weight, mask = magnitude.prune(before.float().contiguous().clone(), InputStatistics("nothing"), target)
        records[name] = Pruned(weight.to(before.dtype), mask, [])
    return records


def pooled_squares(
    block: int, blocks: list[dict[str, SharedInput]], plan: Plan, config: Config, federation: Federation
) -> dict[str, InputStatistics]:
    """The clients' sums of squares of a block's inputs in the model as the stage began, by linear.

    Args:
        blocks: the inputs of every block, from :func:`probe`.
    """
    inputs = {first: replace(one, products=False) for first, one in blocks[block].items()}
    sums = _collect(plan, config, federation, block, inputs, 0, {}, through="dense")
    return {name: _statistics(config, first, one, sums) for first, one in inputs.items() for name in one.consumers}


def prune_by_sums(
    decoder: Decoder,
    block: int,
    blocks: list[dict[str, SharedInput]],
    target: Target,
    plan: Plan,
    config: Config,
    federation: Federation,
    previous: Path,
) -> dict[str, Pruned]:
    """The clients sum, the server prunes with what the sums say.

    Args:
        decoder: the model as the stage began.
        blocks: the inputs of every block, from :func:`probe`.
        target: of this block.
        previous: the file of the block before this one, pruned; with source "sequential" clients pass through it.
    """
    inputs = blocks[block]
    num_inputs = sum(map(len, blocks[1:] if config.protect_first_block else blocks))
    start: dict[str, Tensor] = {}
    sequential = config.calibration_source == "sequential"
    if sequential and block > 0:
        stored = load_file(previous)
        for name, key in decoder.block_names(block - 1).items():
            start[START + name] = as_matrix(decoder.blocks[block - 1].get_submodule(name), stored[key]).contiguous()
    through = f"server/{federation.run.name}" if sequential else "dense"
    sums = _collect(plan, config, federation, block, inputs, num_inputs, start, through=through)
    records = {}
    for first, one in inputs.items():
        known = _statistics(config, first, one, sums)
        pruner = config.pruner if known.kind != "squares" else "wanda"
        for name in one.consumers:
            before = decoder.read_linear(block, name)
            weight = before.to(decoder.device, torch.float32, copy=True).contiguous()
            weight, mask = pruners.prune(pruner, weight, known, target, config.damping_mode)
            records[name] = Pruned(weight.to(before.dtype).cpu(), mask.cpu(), sums.clients)
    return {name: records[name] for name in decoder.block_names(block)}


def _statistics(config: Config, first: str, shared: SharedInput, sums: InputSums) -> InputStatistics:
    """What was summed of one input, as a pruner reads it."""
    squares, upper = sums.sums[f"{first}/squares"], sums.sums.get(f"{first}/products")
    moments = None
    if wants_moments(config):
        moments = sums.sums[f"{first}/sums"], sums.sums[f"{first}/spreads"]
    return statistics.finish(squares, upper, shared.scale, sums.tokens, moments)


def _collect(
    plan: Plan,
    config: Config,
    federation: Federation,
    block: int,
    inputs: Mapping[str, SharedInput],
    num_inputs: int,
    start: Mapping[str, Tensor],
    through: str,
) -> InputSums:
    """Asks for the sums of a block's inputs."""
    tensors = {**{SCALE + name: one.scale for name, one in inputs.items()}, **start}
    messages = {
        client: Message(sum_request(plan, config, federation, client, block, inputs, num_inputs, through), tensors)
        for client in plan.contributors(0, block)
    }
    sums = InputSums(messages)
    federation.aggregator.aggregate(messages, sums)
    return sums


def sum_request(
    plan: Plan,
    config: Config,
    federation: Federation,
    client: str,
    block: int,
    inputs: Mapping[str, SharedInput],
    num_inputs: int,
    through: str,
) -> SumInputs:
    """What one client is asked of a block's inputs.

    Args:
        num_inputs: of how many inputs, in all blocks, sums are released.
        through: see :class:`~fedgrove.client.hidden_states.Calibration`.
    """
    private = None
    if config.epsilon is not None:
        private = Noise(
            norms={first: one.norm for first, one in inputs.items()},
            inputs=num_inputs,
            clients=min_survivors(len(plan.clients)),
            epsilon=config.epsilon,
            delta=config.delta,
        )
    calibration = Calibration(
        stage=plan.stage,
        samples=plan.clients[client].samples,
        length=config.length,
        seed=calibration_seed(federation.job.seed, plan.stage),
        through=through,
        compute_dtype=config.compute_dtype,
    )
    return SumInputs(
        stage=plan.stage,
        run=federation.run.name,
        block=block,
        calibration=calibration,
        consumers={name: first for first, one in inputs.items() for name in one.consumers},
        widths={first: one.scale.numel() for first, one in inputs.items()},
        products=tuple(first for first, one in inputs.items() if one.products),
        moments=wants_moments(config),
        limit=largest_per_client(len(plan.contributors(0, block))),
        noise=private,
    )
