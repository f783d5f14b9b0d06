"""The stage ``prune``: block after block, clients prune it on their own text and the server makes one of theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedgrove import plugins
from fedgrove.client.handlers import START
from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.job import Job, PruneStage
from fedgrove.stages.prune.masks import Target
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.stream import Checkpoint, raw_bytes, save_tensors
from fedgrove.stages.prune.plan import Plan, calibration
from fedgrove.privacy.secure import sum_securely
from fedgrove.rounds.collect import Message, ask
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.aggregator.trimmed import TrimmedSum
from fedgrove.rounds.wire import CHANGE, WEIGHT, Info, WireError
from fedgrove.rounds.wire import check as check_tensors
from fedgrove.stages.prune.aggregation import VALUE_BITS, Options, from_integers, unit_of
from fedgrove.runfolder import Run
from fedgrove.stages.prune.allocate import sparsities
from fedgrove.stages.prune.pooled_stage import Inlet, Pruned, from_statistics, probe, without_data


def prune(model: Checkpoint, plan: Plan, engine: Engine, run: Run) -> Checkpoint:
    """Prunes a model with the plan's clients.

    The server holds the sums of one block, whatever the number of clients. A finished block is a file in the run folder,
    so a stage that was killed goes on at the first block that is missing.

    Returns:
        The model with the pruned blocks laid over it. ``RUN/pruning.json`` tells what was done to every tensor, last by this
        stage, and whose work is in every block of every stage and round (``history``).
    """
    stage = run.job.pruning(plan.stage)
    before = _told(run)
    records: dict[str, Info] = {record["name"]: record for record in before.get("tensors", ())}
    history: list[Info] = [entry for entry in before.get("history", ()) if entry["stage"] < plan.stage]
    for round_ in range(stage.rounds):
        overlay = run.overlay(plan.stage, round_)
        decoder = Decoder(model)
        inlets = probe(decoder, stage, run.job.seed) if stage.aggregation == "pooled" else []
        if round_ == 0:
            shares = sparsities(decoder, inlets, plan, engine, run)
        for block in range(plan.num_blocks):
            file = overlay / f"block-{block:04d}.safetensors"
            if not file.is_file():
                where = f"prune: round {round_ + 1} of {stage.rounds}, block {block + 1} of {plan.num_blocks}"
                run.step(where, round_ * plan.num_blocks + block, stage.rounds * plan.num_blocks)
                _prune_block(decoder, block, round_, inlets, shares, plan, engine, run, file)
        made = _records(overlay)
        records |= {record["name"]: {**record, "stage": plan.stage} for record in made}
        history += _history(made, plan.stage, round_)
        model = model.over(overlay)
    told = {"stage": plan.stage, **stage.model_dump(mode="json"), "tensors": list(records.values()), "history": history}
    run.write_json("pruning.json", told)
    return model


def _prune_block(
    decoder: Decoder,
    block: int,
    round_: int,
    inlets: list[dict[str, Inlet]],
    shares: list[float],
    plan: Plan,
    engine: Engine,
    run: Run,
    file: Path,
) -> None:
    stage = run.job.pruning(plan.stage)
    target = _of_block(stage, shares[block])
    names = decoder.block_names(block)
    if stage.protect_first_block and block == 0:
        made = without_data(decoder, block, target)
    elif stage.aggregation == "pooled":
        previous = file.with_name(f"block-{block - 1:04d}.safetensors")
        made = from_statistics(decoder, block, inlets, target, plan, engine, run, previous)
    else:
        made = _from_solutions(decoder, block, round_, shares, plan, engine, run)
    after, records = {}, []
    for name, pruned in made.items():
        module = decoder.blocks[block].get_submodule(name)
        after[names[name]] = as_matrix(module, pruned.weight).contiguous()
        mask = pruned.mask
        records.append(
            {
                "name": names[name],
                "block": block,
                "round": round_,
                "target": target.sparsity,
                "sparsity": 1 - int(mask.sum()) / mask.numel(),
                "pruned": mask.numel() - int(mask.sum()),
                "numel": mask.numel(),
                "pattern": stage.pattern,
                "clients": pruned.clients,
                "agreement": pruned.agreement,
                "sha256": hashlib.sha256(raw_bytes(after[names[name]])).hexdigest(),
            }
        )
    save_tensors(after, file, {"records": json.dumps(records)})


def _from_solutions(
    decoder: Decoder, block: int, round_: int, shares: list[float], plan: Plan, engine: Engine, run: Run
) -> dict[str, Pruned]:
    """The clients prune the block, and the aggregation makes one of theirs."""
    stage = run.job.pruning(plan.stage)
    aggregation = plugins.load("stages.prune.aggregation", stage.aggregation)
    names = decoder.block_names(block)
    shapes = {name: decoder.blank_linear(block, name) for name in names}  # values are read where they are wanted
    first = plan.stage == 0 and round_ == 0  # then the clients' own copies are what it starts from
    start = {} if first else {START + name: decoder.read_linear(block, name).contiguous() for name in names}
    contributors = plan.contributors(round_, block)
    targets = {client: _of_block(stage, _asked_of(stage, plan, client, shares)[block]) for client in contributors}
    infos = {client: prune_info(run.job, plan, client, round_, block, shares) for client in contributors}
    if run.job.privacy.secure_aggregation:
        units = {name: unit_of(decoder.read_linear(block, name), len(contributors)) for name in names}
        hidden: dict[str, Message] = {
            client: (start, {**info, "units": units, "clients": len(contributors)}) for client, info in infos.items()
        }
        clients, sums = _add_masked(shapes, units, hidden, round_, block, targets, plan, engine, run)
    else:
        messages: dict[str, Message] = {client: (start, info) for client, info in infos.items()}
        clients = []
        sums = {
            name: TrimmedSum(trim=stage.trim, before=decoder.read_linear(block, name)) if stage.trim else WeightedSum()
            for name in names
        }
        check = _checker(decoder, shapes, stage, plan, targets, round_, block)
        for client, tensors, _ in ask(engine, run, "prune", messages, stage=plan.stage, round_=round_, check=check):
            clients.append(client)
            for name in names:
                weight = tensors.pop(WEIGHT + name)
                scale = plan.clients[client].weight
                sums[name].add(tensors.pop(CHANGE + name, None), weight if weight.dim() else float(weight), scale)

    made = {}
    target, options = _of_block(stage, shares[block]), Options(stage.shrink, stage.expand)
    for name in names:
        total = sums.pop(name)  # let go as soon as it is used
        if total.clients == 0:
            continue  # nobody sent it: it stays as it was
        weight, mask = aggregation.finish(decoder.read_linear(block, name), total, target, options)
        made[name] = Pruned(weight, mask, clients, _agreement(total))
    return made


def _add_masked(
    shapes: dict[str, Tensor],
    units: dict[str, int],
    messages: dict[str, Message],
    round_: int,
    block: int,
    targets: dict[str, Target],
    plan: Plan,
    engine: Engine,
    run: Run,
) -> tuple[list[str], dict[str, WeightedSum]]:
    """Who is in the sums, and the sums of whole numbers that secure aggregation opens: no answer is seen, only their sum."""
    stage = run.job.pruning(plan.stage)
    expected = _expected(shapes, stage, torch.uint8, torch.int64)

    def check(client: str, tensors: dict[str, Tensor], info: Info) -> None:
        _check_ask(info, plan, round_, block)
        check_tensors(tensors, expected)

    told, total = sum_securely(engine, run, "prune", messages, stage=plan.stage, round_=round_, check=check, bits=VALUE_BITS)
    sums = {}
    for name, weight in shapes.items():
        votes, value = total[WEIGHT + name], total.get(CHANGE + name)
        each = 2 ** (VALUE_BITS - 2) // len(messages)  # what an honest client sends at most
        kept = sum(weight.numel() - targets[client].num_pruned(weight.numel()) for client in told)
        if (
            int(votes.max()) > len(told)
            or int(votes.long().sum()) != kept
            or (value is not None and (value.abs() > each * votes.long()).any())
        ):
            raise FedgroveError(
                f"block {block}, {name}: the clients' sum holds other votes or values than can be; one of them did not "
                "prune as it was asked, and secure aggregation hides which. Leave clients out until it holds"
            )
        sums[name] = from_integers(value, votes, units[name], len(told))
    return sorted(told), sums


def prune_info(job: Job, plan: Plan, client: str, round_: int, block: int, shares: list[float]) -> Info:
    """The JSON of an ask of kind ``prune``: see :func:`fedgrove.client.handlers.prune`.

    Args:
        shares: the stage's sparsity of each block.
    """
    stage, share = job.pruning(plan.stage), plan.clients[client]
    return {
        "block": block,
        "blocks": share.blocks[round_],
        "stage": plan.stage,
        "round": round_,
        "pruner": stage.pruner,
        "aggregation": stage.aggregation,
        "sparsities": _asked_of(stage, plan, client, shares),
        "pattern": list(stage.kept_of) if stage.pattern else None,
        "source": stage.walk,
        "compute": stage.compute_dtype,
        "damping": stage.damps,
        "keep": job.evaluate.alone and plan.stage == 0 and round_ == 0,
        **calibration(job.seed, plan.stage, share.samples, stage.length),
    }


def _expected(
    shapes: dict[str, Tensor], stage: PruneStage, mask: torch.dtype, value: torch.dtype | None = None
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """What an answer holds of each linear: its mask, and its values (by default in its own dtype) if the aggregation wants them."""
    expected = {WEIGHT + name: (weight.shape, mask) for name, weight in shapes.items()}
    if stage.aggregation != "fedprllm":
        expected |= {CHANGE + name: (weight.shape, value or weight.dtype) for name, weight in shapes.items()}
    return expected


def _checker(
    decoder: Decoder,
    shapes: dict[str, Tensor],
    stage: PruneStage,
    plan: Plan,
    targets: dict[str, Target],
    round_: int,
    block: int,
) -> Callable[[str, dict[str, Tensor], Info], None]:
    """What an answer must look like: to this ask, names, shapes, dtypes, finite values, the sparsity that was asked for."""
    masks = stage.aggregation != "fedavg"
    expected = _expected(shapes, stage, torch.bool)
    if not masks:
        expected |= {WEIGHT + name: (torch.Size(()), torch.float64) for name in shapes}
    limits: dict[str, float] = {}
    if stage.max_weight_growth is not None:
        limits = {name: stage.max_weight_growth * float(decoder.read_linear(block, name).abs().max()) for name in shapes}

    def check(client: str, tensors: dict[str, Tensor], info: Info) -> None:
        _check_ask(info, plan, round_, block)
        share = plan.clients[client]
        check_tensors(tensors, expected)
        target = targets[client]
        for name in shapes:
            if name in limits and float(tensors[CHANGE + name].abs().max()) > limits[name]:
                raise WireError(f"{CHANGE}{name} is more than {stage.max_weight_growth:g} times the largest weight before (max_weight_growth)")
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


def _check_ask(info: Info, plan: Plan, round_: int, block: int) -> None:
    if [info.get(key) for key in ("stage", "round", "block")] != [plan.stage, round_, block]:
        raise WireError("it answers another ask")  # blocks are alike: nothing else would tell


def _asked_of(stage: PruneStage, plan: Plan, client: str, shares: list[float]) -> list[float]:
    """The sparsity of each block that a client is asked for: its own, or where blocks differ, the stage's."""
    return [plan.clients[client].sparsity] * len(shares) if stage.allocation == "even" else shares


def _of_block(stage: PruneStage, sparsity: float) -> Target:
    return Target(sparsity, stage.kept_of if stage.pattern else None)


def _agreement(sums: WeightedSum) -> float | None:
    """The fraction of positions on which all clients voted alike; None where they do not vote."""
    if not isinstance(sums.weight, Tensor):
        return None
    alike = (sums.weight == 0) | (sums.weight == sums.clients)
    return float(alike.double().mean())


def _told(run: Run) -> Info:
    """What earlier stages wrote to ``pruning.json``."""
    file = run.path / "pruning.json"
    told: Info = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return told


def _history(records: list[Info], stage: int, round_: int) -> list[Info]:
    """A round in short: of each block the zeros, who is in it, and how far they agreed."""
    blocks: dict[int, list[Info]] = {}
    for record in records:
        blocks.setdefault(record["block"], []).append(record)
    history = []
    for block, rows in sorted(blocks.items()):
        voted = [row for row in rows if row["agreement"] is not None]
        votes = sum(row["numel"] for row in voted)
        history.append(
            {
                "stage": stage,
                "round": round_,
                "block": block,
                "clients": rows[0]["clients"],
                "numel": sum(row["numel"] for row in rows),
                "pruned": sum(row["pruned"] for row in rows),
                "agreement": sum(row["agreement"] * row["numel"] for row in voted) / votes if votes else None,
            }
        )
    return history


def _records(overlay: Path) -> list[Info]:
    records: list[Info] = []
    for file in sorted(overlay.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            records += json.loads(opened.metadata()["records"])
    return records
