"""Before a stage prunes: how much of each block goes. Asked once, of the model as the stage begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fedgrove import plugins
from fedgrove.stages.prune.allocation import Options
from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.job import PruneStage
from fedgrove.models.blocks import Decoder, linears
from fedgrove.stages.prune.plan import Plan, calibration
from fedgrove.privacy.secure import sum_securely
from fedgrove.rounds.collect import Message, ask
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.wire import CHANGE, Info, WireError
from fedgrove.rounds.wire import check as check_tensors
from fedgrove.runfolder import Run
from fedgrove.stages.prune.pooled_stage import Inlet, pooled_squares

UNIT = 2**32  # a client's numbers travel as whole multiples of 1/UNIT, times its windows


def sparsities(decoder: Decoder, inlets: list[dict[str, Inlet]], plan: Plan, engine: Engine, run: Run) -> list[float]:
    """The sparsity of each block, from ``work/stage-S/allocation.json`` or by asking.

    With aggregation ``pooled`` the clients' sums of squares are pooled and the server measures; with any other, each client
    measures and says one number for each block, and the mean by windows of text counts.

    Args:
        decoder: the model as the stage begins.
        inlets: the inputs of each block, with aggregation ``pooled``.
    """
    stage = run.job.pruning(plan.stage)
    if stage.allocation == "even":
        return [stage.target.sparsity] * plan.num_blocks
    file = _file(run, plan)
    if not file.is_file():
        run.step("prune: asking how much of each block may go")
        first = 1 if stage.protect_first_block else 0  # nothing is asked of the blocks before it
        if stage.aggregation == "pooled":
            measured = _pooled(decoder, inlets, first, plan, engine, run)
        else:
            measured = _asked(plan, engine, run)
        assert stage.sparsity is not None
        method = plugins.load("stages.prune.allocation", stage.allocation)
        shares = method.allocate(measured[first:], _sizes(decoder)[first:], stage.sparsity, options(stage))
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".partial")
        beside.write_text(json.dumps({"measured": measured, "sparsities": [stage.sparsity] * first + shares}), encoding="utf-8")
        beside.replace(file)
    return read_sparsities(run, plan)


def read_sparsities(run: Run, plan: Plan) -> list[float]:
    """What :func:`sparsities` found, once it has run."""
    stage = run.job.pruning(plan.stage)
    if stage.allocation == "even":
        return [stage.target.sparsity] * plan.num_blocks
    found: list[float] = json.loads(_file(run, plan).read_text(encoding="utf-8"))["sparsities"]
    return found


def options(stage: PruneStage) -> Options:
    """The keys of a job that an allocation reads."""
    return Options(stage.owl_m, stage.owl_lambda)


def _pooled(decoder: Decoder, inlets: list[dict[str, Inlet]], first: int, plan: Plan, engine: Engine, run: Run) -> list[float]:
    stage = run.job.pruning(plan.stage)
    method = plugins.load("stages.prune.allocation", stage.allocation)
    measured = [0.0] * first
    for block in range(first, plan.num_blocks):
        inputs = pooled_squares(block, inlets, plan, engine, run)
        weights = {name: decoder.read_linear(block, name) for name in decoder.block_names(block)}
        measured.append(method.measure(weights, inputs, options(stage)))
    return measured


def _asked(plan: Plan, engine: Engine, run: Run) -> list[float]:
    stage, secure = run.job.pruning(plan.stage), run.job.privacy.secure_aggregation
    name = f"{CHANGE}measured"
    messages: dict[str, Message] = {}
    for client, share in plan.clients.items():
        info = {"stage": plan.stage, "allocation": stage.allocation, "owl_m": stage.owl_m, "owl_lambda": stage.owl_lambda}
        info["compute_dtype"] = stage.compute_dtype
        messages[client] = ({}, {**info, **calibration(run.job.seed, plan.stage, share.samples, stage.length)})

    def check(client: str, tensors: dict[str, Tensor], info: Info) -> None:
        if info.get("stage") != plan.stage:
            raise WireError("it answers another ask")
        check_tensors(tensors, {name: (torch.Size([plan.num_blocks]), torch.int64)})
        if not secure:
            _check_range(tensors[name], plan.clients[client].samples)

    if secure:
        infos, sums = sum_securely(engine, run, "allocate", messages, stage=plan.stage, round_=0, check=check)
        samples, total = sum(plan.clients[client].samples for client in infos), sums[name]
        try:
            _check_range(total, samples)
        except WireError as fault:
            raise FedgroveError(
                f"the clients' sum: {fault}; one of them measured nothing, and secure aggregation hides which. "
                "Leave clients out until it holds"
            ) from fault
    else:
        added, samples = WeightedSum(), 0
        for client, tensors, _ in ask(engine, run, "allocate", messages, stage=plan.stage, round_=0, check=check):
            added.add(tensors[name], 1.0)
            samples += plan.clients[client].samples
        assert added.value is not None
        total = added.value
    return [float(value) / UNIT / samples for value in total.tolist()]


def _check_range(numbers: Tensor, samples: int) -> None:
    if (numbers < 0).any() or (numbers > UNIT * samples).any():
        raise WireError("it says of a block what is no fraction")


def _sizes(decoder: Decoder) -> list[int]:
    """The weights in the linears of each block."""
    return [sum(cast(Tensor, module.weight).numel() for module in linears(block).values()) for block in decoder.blocks]


def _file(run: Run, plan: Plan) -> Path:
    return run.path / "work" / f"stage-{plan.stage}" / "allocation.json"
