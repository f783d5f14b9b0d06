"""Pruning and mending on the server: clients send sums over their text, and the server prunes with the totals, exactly as if
all text were in one place, or improves with them what the clients pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove.client.hidden_states import Calibration
from fedgrove.client.server_weights import START
from fedgrove.input_statistics.exchange import SCALE, InputSums, Noise, largest_per_client
from fedgrove.input_statistics.probe import SharedInput
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.masks import Target
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Message
from fedgrove.stages.base import calibration_seed
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.exchanges.personal import POOLED, SolveOwnBlock
from fedgrove.stages.prune.exchanges.statistics import SumInputs, narrow
from fedgrove.stages.prune.menders import mender_of
from fedgrove.stages.prune.plan import Plan
from fedgrove.stages.prune.shared import add_uses, complete_names, forget_sums, read_sums, write_sums
from fedgrove.stages.prune.solving import prune_by_magnitude, prune_linear, statistics_of


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
    """Prunes a block by magnitude. Clients get no request for sums of it."""
    return {name: Pruned(weight, mask, []) for name, weight, mask in prune_by_magnitude(decoder, block, target)}


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
        name: statistics_of(sums.sums, first, one.scale, sums.tokens, federation.device)
        for first, one in inputs.items()
        for name in one.consumers
    }


def prune_by_sums(
    decoder: Decoder,
    block: int,
    inputs: Mapping[str, SharedInput],
    sums: InputSums,
    target: Target,
    config: Config,
    overlay: Path,
) -> dict[str, Pruned]:
    """Prunes a block with the sums over its inputs.

    Args:
        decoder: the model at the start of the stage.
        inputs: the block's inputs, from :func:`~fedgrove.input_statistics.probe.probe`.
        sums: from :func:`sum_inputs`.
        target: the target of this block.
        overlay: the folder of the pruned blocks, where the sums of weights that several blocks share are kept.

    Returns:
        The pruned linears, by name.

    Raises:
        ValueError: the sums hold NaN or infinity, or SparseGPT cannot factor the Gram matrix.
    """
    names = complete_names(decoder, block)
    totals = read_sums(overlay, block, decoder)
    records = {}
    for first, one in inputs.items():
        of_input = partial(statistics_of, sums.sums, first, one.scale, sums.tokens, decoder.device)
        of_block = of_input(moments=config.solver.NEEDS == "moments")
        moments = of_input(moments=True) if config.mend else None
        totals = add_uses(decoder, block, dict.fromkeys(one.consumers, of_block), totals)
        for name in one.consumers:
            if name not in names:
                continue  # a later block has this weight too
            known = totals.pop(names[name], of_block)
            weight, mask = prune_linear(decoder, block, name, known, config.pruner, target, config.damping_mode)
            records[name] = Pruned(weight, mask, sums.clients)
            if moments is not None:
                records[name] = _mended(records[name], decoder.read_linear(block, name), moments, target, config)
    if decoder.shared_linears:
        write_sums(overlay, block + 1, totals)
        forget_sums(overlay, before=block)
    return {name: records[name] for name in names}


def mend_by_sums(
    decoder: Decoder,
    block: int,
    inputs: Mapping[str, SharedInput],
    sums: InputSums,
    target: Target,
    config: Config,
    voted: Mapping[str, Tensor],
) -> dict[str, Pruned]:
    """Mends with the sums over a block's inputs what the clients' votes came to.

    Args:
        decoder: the model at the start of the stage, from which restored weights get their values.
        voted: the block after the last round, by linear; (out, in), in the checkpoint's dtype. Its zeros are what is pruned.

    The other arguments, the result and the errors are as for :func:`prune_by_sums`.
    """
    records = {}
    for first, one in inputs.items():
        moments = statistics_of(sums.sums, first, one.scale, sums.tokens, decoder.device, moments=True)
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


def sum_inputs(
    decoder: Decoder,
    block: int,
    blocks: list[dict[str, SharedInput]],
    plan: Plan,
    config: Config,
    federation: Federation,
    previous: Path,
) -> InputSums:
    """Requests the sums over a block's inputs from the clients.

    Args:
        decoder: the model at the start of the stage.
        blocks: the inputs of every block, from :func:`~fedgrove.input_statistics.probe.probe`.
        previous: the file of the finished previous block; with source "sequential" its weights are sent to the clients.
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
    return _collect(plan, config, federation, block, inputs, products, num_inputs, start, through=through)


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


def send_back(
    block: int,
    target: Target,
    plan: Plan,
    config: Config,
    federation: Federation,
    sums: InputSums | None,
    inputs: Mapping[str, SharedInput],
) -> None:
    """Sends the opened sums of a block to the clients in them, which prune it for themselves (``personal``).

    It comes before the block is stored, so that a killed run repeats it together with the sums.

    Args:
        target: the target of this block.
        sums: the sums; None: none are made of the block, and all clients prune it without.
        inputs: the block's.
    """
    tensors: dict[str, Tensor] = {}
    if sums:
        tensors |= {SCALE + name: one.scale for name, one in inputs.items()}
        tensors |= {POOLED + name: total.cpu() for name, total in sums.sums.items()}
    messages = {}
    for client in sums.clients if sums else sorted(plan.clients):
        statistics = sums.requests[client] if sums else None
        assert statistics is None or isinstance(statistics, SumInputs)
        request = SolveOwnBlock(
            stage=plan.stage,
            block=block,
            calibration=calibration_of(plan, config, federation.job.seed, client, "dense"),
            held_out=plan.clients[client].held_out,
            statistics=statistics,
            tokens=sums.tokens if sums else plan.clients[client].samples * config.length,
            pruner=config.pruner,
            damping=config.damping_mode,
            sparsity=target.sparsity,
            pattern=target.pattern,
        )
        messages[client] = Message(request, tensors)
    for _ in federation.collect(messages):
        pass


def calibration_of(plan: Plan, config: Config, seed: int, client: str, through: str) -> Calibration:
    """A client's windows, and what they pass through."""
    return Calibration(
        stage=plan.stage,
        round=config.rounds - 1,
        samples=plan.clients[client].samples,
        length=config.length,
        seed=calibration_seed(seed, plan.stage),
        through=through,
        compute_dtype=config.compute_dtype,
    )


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
    return SumInputs(
        stage=plan.stage,
        round=config.rounds - 1,
        block=block,
        calibration=calibration_of(plan, config, federation.job.seed, client, through),
        consumers={name: first for first, one in inputs.items() for name in one.consumers},
        widths={first: one.scale.numel() for first, one in inputs.items()},
        products=products,
        mixed=config.mixed,
        moments=config.sums_moments,
        limit=largest_per_client(len(plan.contributors(0, block))),
        noise=private,
    )
