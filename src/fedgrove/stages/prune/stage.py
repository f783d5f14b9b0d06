"""The stage ``prune``, block by block: clients prune on their own text and the server combines their results, which it may
improve by sums over their text, or clients send sums over their text and the server prunes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fedgrove.client.hidden_states import Calibration
from fedgrove.client.server_weights import START
from fedgrove.evaluation.alone import losses_of, number_of, tensors_of
from fedgrove.evaluation.held_out import clients_done, log_once
from fedgrove.events import Phase
from fedgrove.input_statistics.probe import SharedInput, probe
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.masks import Target
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import raw_bytes, save_tensors
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Message
from fedgrove.runfolder import RunFolder
from fedgrove.stages.base import Losses, Result, calibration_seed
from fedgrove.stages.prune.aggregation import Options, client_solved
from fedgrove.stages.prune.allocate import block_sparsities, read_sparsities
from fedgrove.stages.prune.calibration_pass import windows_at_once
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.exchanges.alone import EvaluateAlone
from fedgrove.stages.prune.exchanges.block import BlockSums, PruneBlock
from fedgrove.stages.prune.exchanges.personal import ChooseOwn, OwnLosses
from fedgrove.stages.prune.plan import Plan, make_plan
from fedgrove.stages.prune.pooled import (
    Pruned,
    calibration_of,
    mend_by_sums,
    prune_by_sums,
    prune_without_data,
    send_back,
    sum_inputs,
)
from fedgrove.stages.prune.recipe import Recipe
from fedgrove.stages.prune.shared import complete_names

Record = dict[str, Any]


def plan(index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], job: Job) -> Plan:
    """See :func:`fedgrove.stages.prune.plan.make_plan`."""
    alone = job.evaluate.measures_alone and index == 0
    return make_plan(index, config, decoder, capabilities, job.seed, job.privacy.secure_aggregation, alone)


def run(model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> Result:
    """Prunes a model with the plan's clients.

    The server has the sums of one block in memory, regardless of the number of clients. A finished block is a file in the run
    folder, so an interrupted stage continues with the first missing block.

    Returns:
        The model with the pruned blocks as an overlay. ``RUN/pruning.json`` records the last pruning of every tensor
        (``tensors``), and which clients contributed to every block of every stage and round (``history``).
    """
    run = federation.run
    before = _told(run)
    records: dict[str, Record] = {record["name"]: record for record in before.get("tensors", ())}
    history: list[Record] = [entry for entry in before.get("history", ()) if entry["stage"] < plan.stage]
    sparsities: list[float] = []
    dense = model
    for round_ in range(config.rounds):
        overlay = run.overlay(plan.stage, round_)
        decoder = Decoder(model, federation.device)
        inputs = probe(decoder, config.length, run.job.seed) if plan.sums else []
        if round_ == 0:
            sparsities = block_sparsities(decoder, inputs, plan, config, federation)
        for block in range(plan.num_blocks):
            file = overlay / f"block-{block:04d}.safetensors"
            if not file.is_file():
                phase = Phase(
                    "prune", stage=plan.stage, round=round_, rounds=config.rounds, block=block, blocks=plan.num_blocks
                )
                run.phase(phase)
                _prune_block(decoder, block, round_, inputs, sparsities, plan, config, federation, file)
        block_records = _records(overlay)
        records |= {record["name"]: {**record, "stage": plan.stage} for record in block_records}
        history += _history(block_records, plan.stage, round_)
        model = model.over(overlay)
    if config.mends_votes:
        overlay = run.overlay(plan.stage, config.rounds)
        _mend_votes(dense, model, records, sparsities, plan, config, federation, overlay)
        records |= {record["name"]: {**record, "stage": plan.stage} for record in _records(overlay)}
        model = model.over(overlay)
    if config.personal:
        _keep_personal(plan, config, federation)
    report = {"stage": plan.stage, **config.model_dump(mode="json"), "tensors": list(records.values()), "history": history}
    run.write_json("pruning.json", report)
    return Result(model)


def alone(
    model: Checkpoint,
    plan: Plan,
    config: Config,
    clients: Sequence[str],
    windows: Mapping[str, list[Tensor]],
    federation: Federation,
) -> Iterator[tuple[str, Losses]]:
    """Lets each client measure the model that it pruned by itself; blocks that it stored in the first round are reused."""
    federation.run.phase(Phase("evaluate", "what each client would have had alone", stage=plan.stage))
    sparsities = read_sparsities(federation.run, plan, config)
    tensors, numbers = tensors_of(windows), number_of(windows)
    messages = {}
    for client in clients:
        walk = prune_request(federation.job, plan, config, client, 0, 0, sparsities)
        request = EvaluateAlone(
            stage=plan.stage, texts=numbers, compute_dtype=federation.job.evaluate.compute_dtype, prune=walk
        )
        messages[client] = Message(request, tensors)
    for client, answer, _ in federation.collect(messages):
        yield client, losses_of(answer, windows)


def typical_memory(decoder: Decoder, length: int) -> dict[str, float]:
    """With wanda, which needs small statistics, and with sparsegpt, which needs the largest."""
    needs = {}
    for pruner in ("wanda", "sparsegpt"):
        config = Config(kind="prune", pruner=pruner, sparsity=0.5, length=length, source="dense")
        assignment = make_plan(0, config, decoder, {"one": Capabilities()}, seed=0).clients["one"]
        needs[f"prune with {pruner}"] = float(assignment.memory)
    return needs


def _prune_block(
    decoder: Decoder,
    block: int,
    round_: int,
    inputs: list[dict[str, SharedInput]],
    sparsities: list[float],
    plan: Plan,
    config: Config,
    federation: Federation,
    file: Path,
) -> None:
    target = config.target_of_block(sparsities[block])
    if config.protect_first_block and block == 0:
        if config.personal:
            send_back(block, target, plan, config, federation, None, inputs[block])
        new_block = prune_without_data(decoder, block, target)
    elif plan.sums:
        previous = file.with_name(f"block-{block - 1:04d}.safetensors")
        sums = sum_inputs(decoder, block, inputs, plan, config, federation, previous)
        if config.personal:
            send_back(block, target, plan, config, federation, sums, inputs[block])
        new_block = prune_by_sums(decoder, block, inputs[block], sums, target, config, file.parent)
    else:
        new_block = _prune_by_solutions(decoder, block, round_, sparsities, plan, config, federation)
    _save(decoder, block, round_, new_block, target, config, file)


def _mend_votes(
    dense: Checkpoint,
    voted: Checkpoint,
    records: Mapping[str, Record],
    sparsities: list[float],
    plan: Plan,
    config: Config,
    federation: Federation,
    overlay: Path,
) -> None:
    """Mends every block of what the last round came to, with one more request to every client for each block.

    Args:
        dense: the model at the start of the stage.
        voted: the model after the last round; records: of its tensors, by name.
        overlay: receives the mended blocks; those that are there are not mended again.
    """
    decoder, after = Decoder(dense, federation.device), Decoder(voted)
    inputs = probe(decoder, config.length, federation.job.seed)
    for block in range(plan.num_blocks):
        file = overlay / f"block-{block:04d}.safetensors"
        if file.is_file():
            continue
        federation.run.phase(Phase("prune", "mending the masks", stage=plan.stage, block=block, blocks=plan.num_blocks))
        target = config.target_of_block(sparsities[block])
        names = decoder.block_names(block)
        weights = {name: after.read_linear(block, name) for name in names}
        previous = file.with_name(f"block-{block - 1:04d}.safetensors")
        sums = sum_inputs(decoder, block, inputs, plan, config, federation, previous)
        mended = mend_by_sums(decoder, block, inputs[block], sums, target, config, weights)
        mended = {
            name: replace(pruned, agreement=records[names[name]]["agreement"], clients=records[names[name]]["clients"])
            for name, pruned in mended.items()
        }
        _save(decoder, block, config.rounds - 1, mended, target, config, file)


def _save(
    decoder: Decoder, block: int, round_: int, linears: Mapping[str, Pruned], target: Target, config: Config, file: Path
) -> None:
    """Writes a finished block, with a record of each linear."""
    names = decoder.block_names(block)
    after, records = {}, []
    for name, pruned in linears.items():
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
                "pattern": config.pattern,
                "clients": pruned.clients,
                "agreement": pruned.agreement,
                **({} if pruned.restored is None else {"restored": pruned.restored}),
                "sha256": hashlib.sha256(raw_bytes(after[names[name]])).hexdigest(),
            }
        )
    save_tensors(after, file, {"records": json.dumps(records)})


def _keep_personal(plan: Plan, config: Config, federation: Federation) -> None:
    """Lets every client choose a model of its own on its held-out text, and logs the losses that it tells, if it does."""
    run, stage = federation.run, plan.stage
    tell = not federation.job.privacy.secure_aggregation
    messages = {
        client: Message(
            ChooseOwn(
                stage=stage,
                calibration=calibration_of(plan, config, federation.job.seed, client, "dense"),
                held_out=plan.clients[client].held_out,
                tell=tell,
            )
        )
        for client in sorted(plan.clients.keys() - clients_done(run, stage))
    }
    if not messages:
        return
    run.phase(Phase("evaluate", "which model each client keeps for itself", stage=stage))
    for client, _, reply in federation.collect(messages):
        assert isinstance(reply, OwnLosses)
        if not tell:
            continue
        if reply.own is None:
            run.message(f"prune: client '{client}' was not in the sums of every block: no model of its own")
            continue
        log_once(run, stage, client, reply)


def _prune_by_solutions(
    decoder: Decoder,
    block: int,
    round_: int,
    sparsities: list[float],
    plan: Plan,
    config: Config,
    federation: Federation,
) -> dict[str, Pruned]:
    """The clients prune the block, and the aggregation combines their results."""
    names = complete_names(decoder, block)
    if not names:
        return {}  # later blocks share all of its weights
    first = plan.stage == 0 and round_ == 0  # then clients start from their own copies
    every = decoder.block_names(block)
    start = {} if first else {START + name: decoder.read_linear(block, name).contiguous() for name in every}
    messages = {
        client: Message(prune_request(federation.job, plan, config, client, round_, block, sparsities), start)
        for client in plan.contributors(round_, block)
    }
    scales = {client: plan.clients[client].weight for client in messages}
    sums = BlockSums(decoder, block, scales, config.trim)
    clients = list(federation.aggregator.aggregate(messages, sums, layout=decoder))
    method, target = client_solved(config.aggregation), config.target_of_block(sparsities[block])
    options = Options(config.shrink, config.expand)
    records = {}
    for name in names:
        total = sums.take(name)
        if total.clients == 0:
            continue  # no client sent this linear, so it stays unchanged
        before = decoder.read_linear(block, name).to(decoder.device)
        weight, mask = method.finish(before, total, target, options)
        records[name] = Pruned(weight.cpu(), mask.cpu(), clients, _agreement(total))
    return records


def prune_request(
    job: Job, plan: Plan, config: Config, client: str, round_: int, block: int, sparsities: list[float]
) -> PruneBlock:
    """The request to one client to prune a block.

    Args:
        sparsities: of each block, from :func:`~fedgrove.stages.prune.allocate.read_sparsities`; used if the allocation measures
            blocks, else the client's own sparsity is.
    """
    assignment = plan.clients[client]
    client_sparsities = [assignment.sparsity] * len(sparsities) if not config.measures_blocks else sparsities
    recipe = Recipe(
        pruner=config.pruner,
        damping=config.damping_mode,
        sparsities=tuple(client_sparsities),
        pattern=config.kept_of if config.pattern else None,
        blocks=tuple(assignment.blocks[round_]),
    )
    calibration = Calibration(
        stage=plan.stage,
        round=round_,
        samples=assignment.samples,
        length=config.length,
        seed=calibration_seed(job.seed, plan.stage),
        through="dense" if config.calibration_source == "dense" else recipe.through,
        windows_per_run=windows_at_once(assignment.samples, config.length, config.compute_dtype),
        compute_dtype=config.compute_dtype,
    )
    return PruneBlock(
        stage=plan.stage,
        round=round_,
        block=block,
        calibration=calibration,
        recipe=recipe,
        aggregation=config.aggregation,
        max_weight_growth=config.growth_limit,
        keep=job.evaluate.measures_alone and plan.stage == 0 and round_ == 0,
    )


def _agreement(sums: WeightedSum) -> float | None:
    """The fraction of positions at which all clients' masks agree; None if they send no masks."""
    if not isinstance(sums.weight, Tensor):
        return None
    alike = (sums.weight == 0) | (sums.weight == sums.clients)
    return float(alike.double().mean())


def _told(run: RunFolder) -> Record:
    """What earlier stages wrote to ``pruning.json``."""
    file = run.path / "pruning.json"
    content: Record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def _history(records: list[Record], stage: int, round_: int) -> list[Record]:
    """A summary of a round: for each block the zeros, the clients that contributed, and their agreement."""
    blocks: dict[int, list[Record]] = {}
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


def _records(overlay: Path) -> list[Record]:
    records: list[Record] = []
    for file in sorted(overlay.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            records += json.loads(opened.metadata()["records"])
    return records
