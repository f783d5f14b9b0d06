"""Determines the sparsity of each block, once, from the model as it is at the start of the stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from fedgrove.client.hidden_states import Calibration
from fedgrove.events import Phase
from fedgrove.files import write_atomically
from fedgrove.input_statistics.probe import SharedInput
from fedgrove.models.blocks import Decoder
from fedgrove.models.linears import linears
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Message, Reply, Tensors
from fedgrove.runfolder import RunFolder
from fedgrove.stages.base import calibration_seed
from fedgrove.stages.prune.allocation import Options, allocation_of
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.exchanges.outliers import CODE, MeasureBlocks, check_range
from fedgrove.stages.prune.plan import Plan
from fedgrove.stages.prune.pooled import pooled_squares


def block_sparsities(
    decoder: Decoder, inputs: list[dict[str, SharedInput]], plan: Plan, config: Config, federation: Federation
) -> list[float]:
    """The sparsity of each block: read from ``work/stage-S/allocation.json``, or measured if that file does not exist.

    If the server prunes, it measures the blocks with the clients' pooled sums of squares. Otherwise each client measures the
    blocks and sends one number per block, and the mean over all clients' windows of text is used.

    Args:
        decoder: the model at the start of the stage.
        inputs: the inputs of each block (see :func:`fedgrove.input_statistics.probe.probe`) if the server prunes, else empty.
    """
    run = federation.run
    file = _file(run, plan)
    if config.measures_blocks and not file.is_file():
        run.phase(Phase("prune", "measuring the blocks to decide how sparse each becomes", stage=plan.stage))
        first = 1 if config.protect_first_block else 0  # the blocks before it are not measured
        if plan.sums:
            measured = _measured_here(decoder, inputs, first, plan, config, federation)
        else:
            measured = _measured_by_clients(decoder, plan, config, federation)
        assert config.sparsity is not None
        method = allocation_of(config.allocation)
        rest = method.allocate(measured[first:], _sizes(decoder)[first:], config.sparsity, options(config))
        write_atomically(file, json.dumps({"measured": measured, "sparsities": [config.sparsity] * first + rest}))
    return read_sparsities(run, plan, config)


def read_sparsities(run: RunFolder, plan: Plan, config: Config) -> list[float]:
    """The result of :func:`block_sparsities`, which must have run before."""
    if not config.measures_blocks:
        return [config.target.sparsity] * plan.num_blocks
    sparsities: list[float] = json.loads(_file(run, plan).read_text(encoding="utf-8"))["sparsities"]
    return sparsities


def options(config: Config) -> Options:
    """The keys of a job that an allocation reads."""
    return Options(config.owl_m, config.owl_lambda)


def _measured_here(
    decoder: Decoder, inputs: list[dict[str, SharedInput]], first: int, plan: Plan, config: Config, federation: Federation
) -> list[float]:
    method = allocation_of(config.allocation)
    measured = [0.0] * first
    for block in range(first, plan.num_blocks):
        squares = pooled_squares(block, inputs, plan, config, federation)
        weights = {name: decoder.read_linear(block, name) for name in decoder.block_names(block)}
        measured.append(method.measure(weights, squares, options(config)))
    return measured


def _measured_by_clients(decoder: Decoder, plan: Plan, config: Config, federation: Federation) -> list[float]:
    messages = {client: Message(_request(plan, config, federation, client)) for client in plan.clients}

    def samples(replies: Mapping[str, Reply]) -> int:
        return sum(plan.clients[client].samples for client in replies)

    def check_total(sums: Tensors, replies: Mapping[str, Reply]) -> None:
        check_range(sums["measured"], samples(replies))

    total = IntegerSums(check_total)
    replies = federation.aggregator.aggregate(messages, total, layout=decoder)
    return [value / samples(replies) for value in CODE.decode(total.sums["measured"]).tolist()]


def _request(plan: Plan, config: Config, federation: Federation, client: str) -> MeasureBlocks:
    calibration = Calibration(
        stage=plan.stage,
        samples=plan.clients[client].samples,
        length=config.length,
        seed=calibration_seed(federation.job.seed, plan.stage),
        compute_dtype=config.compute_dtype,
    )
    return MeasureBlocks(
        stage=plan.stage,
        allocation=config.allocation,
        owl_m=config.owl_m,
        owl_lambda=config.owl_lambda,
        calibration=calibration,
    )


def _sizes(decoder: Decoder) -> list[int]:
    """The number of weights in the linears of each block."""
    return [sum(cast(Tensor, module.weight).numel() for module in linears(block).values()) for block in decoder.blocks]


def _file(run: RunFolder, plan: Plan) -> Path:
    return run.path / "work" / f"stage-{plan.stage}" / "allocation.json"
