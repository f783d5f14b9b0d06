"""Pruning on the server: clients send sums over their text, and the server prunes with the totals, exactly as if all text were
in one place."""

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

PROBE = 512  # the largest number of random tokens on which the size of the model's inputs is measured
CLIP_FACTOR = 1.5  # with noise, a window's Σ x² is clipped at this many times the norm that random tokens have


@dataclass(frozen=True)
class Pruned:
    """A pruned linear.

    Attributes:
        weight: (out, in), in the checkpoint's dtype, zero where the mask is False.
        mask: (out, in) bool, True = kept.
        clients: the names of the clients that contributed.
        agreement: the fraction of weights on which all clients' masks agree; None if they sent no masks.
    """

    weight: Tensor
    mask: Tensor
    clients: list[str]
    agreement: float | None = None


@dataclass(frozen=True)
class SharedInput:
    """An input that one or several linears of a block read.

    Attributes:
        consumers: the linears that read it; the input is named after the first.
        scale: (in,) powers of two by which clients multiply, see :func:`fedgrove.stages.prune.aggregation.pooled.scale_of`.
        products: whether clients sum Σ xᵢxⱼ, besides Σ x².
        norm: for differential privacy, the L2 norm to which a window's scaled Σ x² is clipped.
    """

    consumers: list[str]
    scale: Tensor
    products: bool
    norm: float


def probe(decoder: Decoder, stage: Config, seed: int) -> list[dict[str, SharedInput]]:
    """Finds the inputs of every block and measures how large they are, in one pass over random tokens; no text is used.

    Args:
        decoder: the model at the start of the stage.
        stage: the stage's table.
        seed: draws the random tokens.

    Returns:
        For each block, its inputs by name.
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
    """An input's statistics on random tokens; if none reached this expert, those of the same linear in another expert."""
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
    """Prunes a block by magnitude. Clients get no request."""
    records = {}
    for name in decoder.block_names(block):
        before = decoder.read_linear(block, name)
        weight, mask = magnitude.prune(before.float().contiguous().clone(), InputStatistics("nothing"), target)
        records[name] = Pruned(weight.to(before.dtype), mask, [])
    return records


def pooled_squares(
    block: int, blocks: list[dict[str, SharedInput]], plan: Plan, config: Config, federation: Federation
) -> dict[str, InputStatistics]:
    """The sums of squares of a block's inputs over all clients' text, in the model at the start of the stage, by linear.

    Args:
        blocks: the inputs of every block, from :func:`probe`.
    """
    inputs = {first: replace(one, products=False) for first, one in blocks[block].items()}
    sums = _collect(plan, config, federation, block, inputs, 0, {}, through="dense")
    return {
        name: _statistics(config, first, one, sums, federation.device)
        for first, one in inputs.items()
        for name in one.consumers
    }


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
    """Requests the sums of a block's inputs from the clients, and prunes the block with the totals.

    Args:
        decoder: the model at the start of the stage.
        blocks: the inputs of every block, from :func:`probe`.
        target: the target of this block.
        previous: the file of the pruned previous block; with source "sequential" its weights are sent to the clients.

    Returns:
        The pruned linears, by name.

    Raises:
        ValueError: the sums hold NaN or infinity, or SparseGPT cannot factor the Gram matrix.
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
        known = _statistics(config, first, one, sums, decoder.device)
        pruner = config.pruner if known.kind != "squares" else "wanda"
        for name in one.consumers:
            before = decoder.read_linear(block, name)
            weight = before.to(decoder.device, torch.float32, copy=True).contiguous()
            weight, mask = pruners.prune(pruner, weight, known, target, config.damping_mode)
            records[name] = Pruned(weight.to(before.dtype).cpu(), mask.cpu(), sums.clients)
    return {name: records[name] for name in decoder.block_names(block)}


def _statistics(
    config: Config, first: str, shared: SharedInput, sums: InputSums, device: torch.device | str
) -> InputStatistics:
    """The statistics of one input for a pruner, from the sums, on the device where it prunes."""
    at = {name.removeprefix(f"{first}/"): total.to(device) for name, total in sums.sums.items() if name.startswith(f"{first}/")}
    moments = (at["sums"], at["spreads"]) if wants_moments(config) else None
    return statistics.finish(at["squares"], at.get("products"), shared.scale.to(device), sums.tokens, moments)


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
    """Requests the sums of a block's inputs from the clients, and adds them up."""
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
    """The request to one client for the sums of a block's inputs.

    Args:
        num_inputs: the number of inputs, in all blocks, whose sums are released; used only with ``epsilon``.
        through: see :class:`~fedgrove.client.hidden_states.Calibration`.
    """
    private = None
    if config.epsilon is not None:
        private = Noise(
            norms={first: one.norm for first, one in inputs.items()},
            inputs=num_inputs,
            skips_first=config.protect_first_block,
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
        block=block,
        calibration=calibration,
        consumers={name: first for first, one in inputs.items() for name in one.consumers},
        widths={first: one.scale.numel() for first, one in inputs.items()},
        products=tuple(first for first, one in inputs.items() if one.products),
        moments=wants_moments(config),
        limit=largest_per_client(len(plan.contributors(0, block))),
        noise=private,
    )
