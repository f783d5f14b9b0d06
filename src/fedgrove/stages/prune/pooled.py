"""Pruning and mending on the server: clients send sums over their text, and the server prunes with the totals, exactly as if
all text were in one place, or improves with them what the clients pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from fedgrove.stages.prune.menders import mender_of
from fedgrove.stages.prune.plan import Plan
from fedgrove.stages.prune.pruners import magnitude
from fedgrove.stages.prune.shared import add_uses, complete_names, forget_sums, read_sums, write_sums


@dataclass(frozen=True)
class Pruned:
    """A pruned linear.

    Attributes:
        weight: (out, in), in the checkpoint's dtype, zero where the mask is False.
        mask: (out, in) bool, True = kept.
        clients: the names of the clients that contributed.
        agreement: the fraction of weights on which all clients' masks agree; None if they sent no masks.
        restored: how many weights came back when the mask was mended, each in place of another; None: it was not mended.
    """

    weight: Tensor
    mask: Tensor
    clients: list[str]
    agreement: float | None = None
    restored: int | None = None


def _with_products(decoder: Decoder, config: Config, inputs: Mapping[str, SharedInput]) -> tuple[str, ...]:
    """The inputs whose products the pruner needs, besides their squares."""
    if not config.sums_products:
        return ()
    widths = {first: one.scale.numel() for first, one in inputs.items()}
    return narrow(widths, decoder) if config.mixed else tuple(widths)


def prune_without_data(decoder: Decoder, block: int, target: Target) -> dict[str, Pruned]:
    """Prunes a block by magnitude. Clients get no request."""
    records = {}
    for name in complete_names(decoder, block):
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
    return {name: _statistics(first, one, sums, federation.device) for first, one in inputs.items() for name in one.consumers}


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
    sums = _sums_of_block(decoder, block, blocks, plan, config, federation, previous)
    names = complete_names(decoder, block)
    totals = read_sums(previous.parent, block, decoder)
    records = {}
    for first, one in blocks[block].items():
        of_block = _statistics(first, one, sums, decoder.device, moments=config.solver.NEEDS == "moments")
        moments = _statistics(first, one, sums, decoder.device, moments=True) if config.mend else None
        pruner = "wanda" if config.sums_products and of_block.kind == "squares" else config.pruner  # with mixed = true
        totals = add_uses(decoder, block, dict.fromkeys(one.consumers, of_block), totals)
        for name in one.consumers:
            if name not in names:
                continue
            known = totals.pop(names[name], of_block)
            before = decoder.read_linear(block, name)
            weight = before.to(decoder.device, torch.float32, copy=True).contiguous()
            weight, mask = pruners.prune(pruner, weight, known, target, config.damping_mode)
            pruned = Pruned(weight.to(before.dtype).cpu(), mask.cpu(), sums.clients)
            records[name] = pruned if moments is None else _mended(pruned, before, moments, target, config)
    if decoder.shared_linears:
        write_sums(previous.parent, block + 1, totals)
        forget_sums(previous.parent, before=block)
    return {name: records[name] for name in names}


def mend_by_sums(
    decoder: Decoder,
    block: int,
    blocks: list[dict[str, SharedInput]],
    voted: Mapping[str, Tensor],
    target: Target,
    plan: Plan,
    config: Config,
    federation: Federation,
    previous: Path,
) -> dict[str, Pruned]:
    """Requests the sums of a block's inputs from the clients, and mends with the totals what the clients' votes came to.

    Args:
        decoder: the model at the start of the stage, from which restored weights get their values.
        voted: the block after the last round, by linear; (out, in), in the checkpoint's dtype. Its zeros are what is pruned.
        previous: the file of the mended previous block.

    The other arguments, the result and the errors are as for :func:`prune_by_sums`.
    """
    sums = _sums_of_block(decoder, block, blocks, plan, config, federation, previous)
    records = {}
    for first, one in blocks[block].items():
        moments = _statistics(first, one, sums, decoder.device, moments=True)
        for name in one.consumers:
            pruned = Pruned(voted[name], voted[name] != 0, sums.clients)
            records[name] = _mended(pruned, decoder.read_linear(block, name), moments, target, config)
    return {name: records[name] for name in decoder.block_names(block)}


def _mended(pruned: Pruned, before: Tensor, moments: InputStatistics, target: Target, config: Config) -> Pruned:
    """A pruned linear with the mask that the stage's mender makes of its own."""
    assert config.mend is not None
    device = moments.squares.device
    dense, sparse = (tensor.to(device, torch.float32).contiguous() for tensor in (before, pruned.weight))
    mask = pruned.mask.to(device, copy=True)
    weight, mask = mender_of(config.mend).mend(dense, sparse, mask, moments, target)
    mask = mask.cpu()
    restored = int((mask & ~pruned.mask).count_nonzero())
    return replace(pruned, weight=weight.to(before.dtype).cpu(), mask=mask, restored=restored)


def _sums_of_block(
    decoder: Decoder,
    block: int,
    blocks: list[dict[str, SharedInput]],
    plan: Plan,
    config: Config,
    federation: Federation,
    previous: Path,
) -> InputSums:
    """The clients' sums over one block's inputs; the arguments are those of :func:`prune_by_sums`."""
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
    return _collect(plan, config, federation, block, inputs, products, num_inputs, start, through=through)


def _statistics(
    first: str, shared: SharedInput, sums: InputSums, device: torch.device | str, moments: bool = False
) -> InputStatistics:
    """The statistics of one input, from the sums, on the device where the server prunes.

    Args:
        moments: means and variances; else the products, or the squares where no products were summed.
    """
    at = {name.removeprefix(f"{first}/"): total.to(device) for name, total in sums.sums.items() if name.startswith(f"{first}/")}
    of_moments = (at["sums"], at["spreads"]) if moments else None
    return fixed_point.finish(at["squares"], at.get("products"), shared.scale.to(device), sums.tokens, of_moments)


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
        round=config.rounds - 1,
        samples=plan.clients[client].samples,
        length=config.length,
        seed=calibration_seed(federation.job.seed, plan.stage),
        through=through,
        compute_dtype=config.compute_dtype,
    )
    return SumInputs(
        stage=plan.stage,
        round=config.rounds - 1,
        block=block,
        calibration=calibration,
        consumers={name: first for first, one in inputs.items() for name in one.consumers},
        widths={first: one.scale.numel() for first, one in inputs.items()},
        products=products,
        mixed=config.mixed,
        moments=config.sums_moments,
        limit=largest_per_client(len(plan.contributors(0, block))),
        noise=private,
    )
