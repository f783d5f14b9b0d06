"""The stage ``prune``: block after block, clients prune it on their own text and the server makes one of theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor

from fedgrove import plugins
from fedgrove.client import START
from fedgrove.engine import Engine
from fedgrove.job import Job, PruneStage
from fedgrove.masks import Target
from fedgrove.models.blocks import Decoder, as_matrix, linears
from fedgrove.models.stream import Checkpoint, raw_bytes, save_tensors
from fedgrove.plan import Plan
from fedgrove.rounds.ask import Message, ask
from fedgrove.rounds.fold import Sums
from fedgrove.rounds.wire import CHANGE, WEIGHT, Info, WireError
from fedgrove.rounds.wire import check as check_tensors
from fedgrove.rules import Options
from fedgrove.run import Run


def prune(model: Checkpoint, plan: Plan, engine: Engine, run: Run) -> Checkpoint:
    """Prunes a model with the plan's clients.

    The server holds the sums of one block, whatever the number of clients. A finished block is a file in the run folder,
    so a stage that was killed goes on at the first block that is missing.

    Returns:
        The model with the pruned blocks laid over it. ``RUN/pruning.json`` tells what was done to every tensor.
    """
    stage = cast(PruneStage, run.job.stages[plan.stage])
    records: dict[str, Info] = {}
    for round_ in range(stage.rounds):
        overlay = run.overlay(plan.stage, round_)
        decoder = Decoder(model)
        for block in range(plan.num_blocks):
            file = overlay / f"block-{block:04d}.safetensors"
            if not file.is_file():
                run.say(f"prune: round {round_ + 1} of {stage.rounds}, block {block + 1} of {plan.num_blocks}")
                _prune_block(decoder, block, round_, plan, engine, run, file)
        records |= {record["name"]: record for record in _records(overlay)}
        model = model.over(overlay)
    run.write_json("pruning.json", {"stage": plan.stage, **stage.model_dump(mode="json"), "tensors": list(records.values())})
    return model


def _prune_block(decoder: Decoder, block: int, round_: int, plan: Plan, engine: Engine, run: Run, file: Path) -> None:
    stage = cast(PruneStage, run.job.stages[plan.stage])
    rule = plugins.load("rules", stage.rule)
    names = decoder.block_names(block)
    before = {name: decoder.read_linear(block, name) for name in names}
    first = plan.stage == 0 and round_ == 0  # then the clients' own copies are what it starts from
    start = {} if first else {START + name: weight.contiguous() for name, weight in before.items()}
    clients = plan.contributors(round_, block)
    messages: dict[str, Message] = {client: (start, prune_info(run.job, plan, client, round_, block)) for client in clients}

    sums = {name: Sums() for name in names}
    contributors = []
    for client, tensors, _ in ask(
        engine, run, "prune", messages, stage=plan.stage, round_=round_, check=_checker(before, stage, plan, round_, block)
    ):
        contributors.append(client)
        for name in names:
            weight = tensors[WEIGHT + name]
            sums[name].add(tensors.get(CHANGE + name), weight if weight.dim() else float(weight), plan.clients[client].weight)

    after, records = {}, []
    for name in names:
        if sums[name].clients == 0:
            continue  # nobody sent it: it stays as it was
        weight, mask = rule.finish(before[name], sums[name], stage.target, Options(stage.shrink, stage.expand))
        module = linears(decoder.blocks[block])[name]
        after[names[name]] = as_matrix(module, weight).contiguous()
        records.append(
            {
                "name": names[name],
                "block": block,
                "round": round_,
                "target": stage.target.sparsity,
                "sparsity": 1 - int(mask.sum()) / mask.numel(),
                "pruned": mask.numel() - int(mask.sum()),
                "numel": mask.numel(),
                "pattern": stage.pattern,
                "clients": contributors,
                "agreement": _agreement(sums[name]),
                "sha256": hashlib.sha256(raw_bytes(after[names[name]])).hexdigest(),
            }
        )
    save_tensors(after, file, {"records": json.dumps(records)})


def prune_info(job: Job, plan: Plan, client: str, round_: int, block: int) -> Info:
    """The JSON of an ask of kind ``prune``: see :func:`fedgrove.client.prune`."""
    stage, share = cast(PruneStage, job.stages[plan.stage]), plan.clients[client]
    return {
        "block": block,
        "blocks": share.blocks[round_],
        "stage": plan.stage,
        "round": round_,
        "pruner": stage.pruner,
        "rule": stage.rule,
        "sparsity": share.sparsity,
        "pattern": list(stage.kept_of) if stage.pattern else None,
        "keep": job.evaluate.alone and plan.stage == 0 and round_ == 0,
        **calibration(job.seed, plan.stage, share.samples, stage.length),
    }


def calibration(seed: int, stage: int, samples: int, length: int) -> Info:
    """Which calibration windows a client draws."""
    return {"samples": samples, "length": length, "seed": f"{seed}/{stage}"}


def _checker(
    before: dict[str, Tensor], stage: PruneStage, plan: Plan, round_: int, block: int
) -> Callable[[str, dict[str, Tensor], Info], None]:
    """What an answer must look like: to this ask, names, shapes, dtypes, finite values, the sparsity that was asked for."""

    def check(client: str, tensors: dict[str, Tensor], info: Info) -> None:
        if [info.get(key) for key in ("stage", "round", "block")] != [plan.stage, round_, block]:
            raise WireError("it answers another ask")  # blocks are alike: nothing else would tell
        share = plan.clients[client]
        masks = stage.rule != "mean"
        expected = {}
        for name, weight in before.items():
            expected[WEIGHT + name] = (weight.shape, torch.bool) if masks else (torch.Size(()), torch.float64)
            if stage.rule != "masks":
                expected[CHANGE + name] = (weight.shape, weight.dtype)
        check_tensors(tensors, expected)
        target = Target(share.sparsity, stage.kept_of if stage.pattern else None)
        for name in before:
            if masks:
                kept = tensors[WEIGHT + name]
                pruned = kept.numel() - int(kept.sum())
                if pruned != target.num_pruned(kept.numel()):
                    raise WireError(f"{WEIGHT}{name} prunes {pruned} of {kept.numel()} weights, not {target} of them")
                if target.pattern and (kept.view(-1, target.pattern[1]).sum(1) != target.pattern[0]).any():
                    raise WireError(f"{WEIGHT}{name} does not keep {target} inputs")
            elif float(tensors[WEIGHT + name]) != share.samples * stage.length:
                raise WireError(f"{WEIGHT}{name} claims {float(tensors[WEIGHT + name]):g} tokens")

    return check


def _agreement(sums: Sums) -> float | None:
    """The fraction of positions on which all clients voted alike; None where they do not vote."""
    if not isinstance(sums.weight, Tensor):
        return None
    alike = (sums.weight == 0) | (sums.weight == sums.clients)
    return float(alike.double().mean())


def _records(overlay: Path) -> list[Info]:
    records: list[Info] = []
    for file in sorted(overlay.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            records += json.loads(opened.metadata()["records"])
    return records
