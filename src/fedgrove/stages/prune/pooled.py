"""Pruning on the server: clients send sums over their text, and the server prunes with the totals, exactly as if all text were
in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove.client.hidden_states import Calibration
from fedgrove.client.server_weights import START
from fedgrove.input_statistics import fixed_point
from fedgrove.input_statistics.exchange import SCALE, InputSums, Noise, largest_per_client
from fedgrove.input_statistics.probe import SharedInput
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.masks import Target
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Message
from fedgrove.stages.base import calibration_seed
from fedgrove.stages.prune import pruners
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.exchanges.statistics import SumInputs, narrow
from fedgrove.stages.prune.plan import Plan
from fedgrove.stages.prune.pruners import magnitude


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


def _with_products(decoder: Decoder, config: Config, inputs: Mapping[str, SharedInput]) -> tuple[str, ...]:
    """The inputs whose products the pruner needs, besides their squares."""
    if config.solver.NEEDS != "gram":
        return ()
    widths = {first: one.scale.numel() for first, one in inputs.items()}
    return narrow(widths, decoder) if config.mixed else tuple(widths)


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
        blocks: the inputs of every block, from :func:`~fedgrove.input_statistics.probe.probe`.
    """
    inputs = blocks[block]
    sums = _collect(plan, config, federation, block, inputs, (), 0, {}, through="dense")
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
        blocks: the inputs of every block, from :func:`~fedgrove.input_statistics.probe.probe`.
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
    products = _with_products(decoder, config, inputs)
    sums = _collect(plan, config, federation, block, inputs, products, num_inputs, start, through=through)
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
    return fixed_point.finish(at["squares"], at.get("products"), shared.scale.to(device), sums.tokens, moments)


def _collect(
    plan: Plan,
    config: Config,
    federation: Federation,
    block: int,
    inputs: Mapping[str, SharedInput],
    products: tuple[str, ...],
    num_inputs: int,
    start: Mapping[str, Tensor],
    through: str,
) -> InputSums:
    """Requests the sums of a block's inputs from the clients, and adds them up."""
    tensors = {**{SCALE + name: one.scale for name, one in inputs.items()}, **start}
    messages = {
        client: Message(sum_request(plan, config, federation, client, block, inputs, products, num_inputs, through), tensors)
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
    products: tuple[str, ...],
    num_inputs: int,
    through: str,
) -> SumInputs:
    """The request to one client for the sums of a block's inputs.

    Args:
        products: the inputs whose products are summed too.
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
        products=products,
        mixed=config.mixed,
        moments=wants_moments(config),
        limit=largest_per_client(len(plan.contributors(0, block))),
        noise=private,
    )
