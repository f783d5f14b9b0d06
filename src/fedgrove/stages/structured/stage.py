"""The stage ``structured``: clients say what each channel and head is worth, and the server cuts as many out of every block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedgrove import plugins
from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.job import StructuredStage
from fedgrove.stages.prune.masks import lowest
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.stream import Checkpoint, save_tensors
from fedgrove.models.width import cut_columns, cut_rows, family_of, width_of
from fedgrove.stages.structured.plan import StructuredPlan
from fedgrove.stages.prune.plan import calibration
from fedgrove.privacy.secure import sum_securely
from fedgrove.rounds.collect import Message, ask
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.wire import CHANGE, Info, WireError
from fedgrove.rounds.wire import check as check_tensors
from fedgrove.stages.structured.scores import LARGEST, floating_point
from fedgrove.runfolder import Run

Kept = dict[str, Tensor]  # "channels" and "heads": ascending indices of the groups that stay


def narrow(model: Checkpoint, plan: StructuredPlan, engine: Engine, run: Run) -> Checkpoint:
    """Narrows every block of a model by the plan, so that one plain config.json describes it.

    The clients are asked once, for all blocks; their sum is a file in the run folder, and so is each block that was cut: a
    stage that was killed goes on there.

    Returns:
        The narrower model, laid over the model. ``RUN/structured.json`` tells what went.
    """
    stage = run.job.narrowing(plan.stage)
    file = _sums_file(run, plan)
    if not file.is_file():
        run.step("narrow: asking what each channel and head is worth")
        clients, tokens, sums, own = _collect(model, plan, engine, run)
        save_tensors({**sums, **own}, file, {"clients": json.dumps(clients), "tokens": str(tokens)})
    overlay = run.overlay(plan.stage, 0)
    blocks = _cut(model, plan, stage, _read_sums(file), overlay, run)
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    run.write_json(
        "structured.json",
        {
            "stage": plan.stage,
            **stage.model_dump(mode="json"),
            "clients": json.loads(said["clients"]),
            "tokens": int(said["tokens"]),
            "before": asdict(plan.before),
            "after": asdict(plan.after),
            "queries": plan.queries,
            "parameters": list(plan.parameters),
            "bytes": [model.num_bytes(), model.over(overlay, width=plan.after).num_bytes()],
            "types": list(plan.types),
            "blocks": blocks,
        },
    )
    return model.over(overlay, width=plan.after)


def alone(model: Checkpoint, plan: StructuredPlan, client: str, run: Run) -> Checkpoint:
    """The model as one client's sums alone would have it. The server has them, so nobody is asked.

    Args:
        model: as the stage began.
    """
    sums = _read_sums(_sums_file(run, plan), f"{client}/")
    if not sums:
        raise FedgroveError(f"client '{client}': it sent no sums, so nothing is known of what it has alone (evaluate.alone)")
    overlay = run.path / "work" / f"stage-{plan.stage}" / "alone" / client
    _cut(model, plan, run.job.narrowing(plan.stage), sums, overlay)
    return model.over(overlay, width=plan.after)


def structured_info(run: Run, plan: StructuredPlan, client: str) -> Info:
    """The JSON of an ask of kind ``structured``: see :func:`fedgrove.client.handlers.narrow`."""
    stage = run.job.narrowing(plan.stage)
    return {
        "stage": plan.stage,
        "score": stage.score,
        "limit": LARGEST // len(plan.clients),
        **calibration(run.job.seed, plan.stage, plan.clients[client].samples, stage.length),
    }


def _collect(
    model: Checkpoint, plan: StructuredPlan, engine: Engine, run: Run
) -> tuple[list[str], int, dict[str, Tensor], dict[str, Tensor]]:
    """Who is in the sum, of how many tokens, the sum, and where it is wanted each client's part of it."""
    stage, secure = run.job.narrowing(plan.stage), run.job.privacy.secure_aggregation
    signed = plugins.load("stages.structured.scores", stage.score).SIGNED
    messages: dict[str, Message] = {client: ({}, structured_info(run, plan, client)) for client in plan.clients}
    kinds = ["channels"] if family_of(model.config).heads is None else ["channels", "heads"]
    expected = {
        f"{CHANGE}{block}/{kind}": (torch.Size([getattr(plan.before, kind)]), torch.int64)
        for block in range(plan.num_blocks)
        for kind in kinds
    }

    def check(client: str, tensors: dict[str, Tensor], info: Info) -> None:
        wanted = plan.clients[client].samples * stage.length
        if [info.get("stage"), info.get("tokens")] != [plan.stage, wanted]:
            raise WireError(f"it answers another ask, or claims other tokens than {wanted}")
        check_tensors(tensors, expected)
        if not secure:  # else no value can be told from random
            _check_values(tensors, signed, LARGEST // len(plan.clients))

    if secure:
        infos, sums = sum_securely(engine, run, "structured", messages, stage=plan.stage, round_=0, check=check)
        try:
            _check_values(sums, signed, LARGEST)
        except WireError as fault:
            raise FedgroveError(
                f"the clients' sum: {fault}; one of them sent no scores, and secure aggregation hides which. "
                "Leave clients out until it holds"
            ) from fault
        return sorted(infos), sum(info["tokens"] for info in infos.values()), sums, {}
    totals = {name: WeightedSum() for name in expected}
    clients, tokens, own = [], 0, {}
    for client, answer, info in ask(engine, run, "structured", messages, stage=plan.stage, round_=0, check=check):
        clients.append(client)
        tokens += info["tokens"]
        for name, total in totals.items():
            total.add(answer[name], 1.0)
            if run.job.evaluate.alone:
                own[f"{client}/{name}"] = answer[name]
    return clients, tokens, {name: total.value for name, total in totals.items() if total.value is not None}, own


def _check_values(tensors: Mapping[str, Tensor], signed: bool, limit: int) -> None:
    for name, tensor in tensors.items():
        if (tensor > limit).any() or (tensor < (-limit if signed else 0)).any():
            raise WireError(f"{name} is out of range")


def _cut(
    model: Checkpoint, plan: StructuredPlan, stage: StructuredStage, sums: Mapping[str, Tensor], overlay: Path, run: Run | None = None
) -> list[Info]:
    """Cuts every block that is not cut yet; gives which groups went."""
    decoder = Decoder(model)
    aggregation = plugins.load("stages.structured.scores", stage.score)
    records: list[Info] = []
    for block in range(plan.num_blocks):
        kept: Kept = {}
        record: Info = {"block": block}
        for kind in ("channels", "heads"):
            before, after = getattr(plan.before, kind), getattr(plan.after, kind)
            kept[kind] = torch.arange(before)
            if after < before:
                gone = lowest([aggregation.finish(floating_point(sums[f"{CHANGE}{block}/{kind}"]))], before - after)
                kept[kind] = (~gone).nonzero().squeeze(1)
                record[kind] = gone.nonzero().squeeze(1).tolist()
        records.append(record)
        file = overlay / f"block-{block:04d}.safetensors"
        if not file.is_file():
            if run:
                run.step(f"narrow: block {block + 1} of {plan.num_blocks}", block, plan.num_blocks)
            save_tensors(cut_block(decoder, block, kept), file)
    return records


def cut_block(decoder: Decoder, block: int, kept: Kept) -> dict[str, Tensor]:
    """The tensors of a block with the groups that stay, in the form and under the names of the checkpoint."""
    config = decoder.checkpoint.config
    family, width, names = family_of(config), width_of(config), decoder.block_names(block)
    cut: dict[str, Tensor] = {}
    for kind, part in (("channels", family.channels), ("heads", family.heads)):
        number = getattr(width, kind)
        if part is None or len(kept[kind]) == number:
            continue
        for name in part.makers:
            module = decoder.blocks[block].get_submodule(name)
            weight = cut_rows(decoder.read_linear(block, name), number, kept[kind])
            cut[names[name]] = as_matrix(module, weight).contiguous()
            if getattr(module, "bias", None) is not None:
                bias = names[name].removesuffix("weight") + "bias"
                cut[bias] = cut_rows(decoder.checkpoint.read(bias), number, kept[kind])
        module = decoder.blocks[block].get_submodule(part.reader)
        weight = cut_columns(decoder.read_linear(block, part.reader), number, kept[kind])
        cut[names[part.reader]] = as_matrix(module, weight).contiguous()
    return cut


def _sums_file(run: Run, plan: StructuredPlan) -> Path:
    return run.path / "work" / f"stage-{plan.stage}" / "sums.safetensors"


def _read_sums(file: Path, prefix: str = "") -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {
            name.removeprefix(prefix): opened.get_tensor(name)
            for name in opened.keys()  # noqa: SIM118
            if name.startswith(prefix + CHANGE)
        }
