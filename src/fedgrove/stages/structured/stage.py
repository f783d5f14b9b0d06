"""The stage ``structured``: clients score channels and heads, and the server cuts the same number out of every block."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedgrove.client.hidden_states import Calibration
from fedgrove.errors import FedgroveError
from fedgrove.events import Phase
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.masks import lowest
from fedgrove.models.perplexity import negative_log_likelihoods
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.models.width import cut_columns, cut_rows, family_of, width_of
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import CHANGE, Message, Reply, Tensors
from fedgrove.runfolder import RunFolder
from fedgrove.stages.base import Losses, Result, calibration_seed
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.exchanges.scores import CODE, LARGEST, ScoreGroups, Tokens, check_values
from fedgrove.stages.structured.plan import Plan, make_plan
from fedgrove.stages.structured.scores import score_of

Kept = dict[str, Tensor]  # "channels" and "heads": ascending indices of the groups that stay


def plan(index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], job: Job) -> Plan:
    """See :func:`fedgrove.stages.structured.plan.make_plan`."""
    return make_plan(index, config, decoder, capabilities, job.privacy.secure_aggregation)


def run(model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> Result:
    """Cuts every block of a model to the plan's widths, so that one plain config.json describes the model.

    Each client gets one request, for all blocks. The sum of the responses is a file in the run folder, and so is each block
    that was cut, so an interrupted stage continues from these files.

    Returns:
        The model with the narrower blocks as an overlay. ``RUN/structured.json`` records what was cut.
    """
    run = federation.run
    file = _sums_file(run, plan)
    if not file.is_file():
        run.phase(Phase("structured", "measuring how much each channel and head matters", stage=plan.stage))
        clients, tokens, sums = _collect(model, plan, config, federation)
        save_tensors(sums, file, {"clients": json.dumps(clients), "tokens": str(tokens)})
    overlay = run.overlay(plan.stage, 0)
    blocks = _cut(model, plan, config, _read_sums(file), overlay, run)
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    result = model.over(overlay, width=plan.after)
    run.write_json(
        "structured.json",
        {
            "stage": plan.stage,
            **config.model_dump(mode="json"),
            "clients": json.loads(said["clients"]),
            "tokens": int(said["tokens"]),
            "before": asdict(plan.before),
            "after": asdict(plan.after),
            "queries": plan.queries,
            "parameters": list(plan.parameters),
            "bytes": [model.num_bytes(), result.num_bytes()],
            "types": list(plan.types),
            "blocks": blocks,
        },
    )
    return Result(result)


def alone(
    model: Checkpoint,
    plan: Plan,
    config: Config,
    clients: Sequence[str],
    windows: Mapping[str, list[Tensor]],
    federation: Federation,
) -> Iterator[tuple[str, Losses]]:
    """Cuts the model by each client's own sums and measures it. The server has these sums, so clients get no request."""
    run = federation.run
    for number, client in enumerate(clients):
        what = f"what {client} would have had alone"
        run.phase(Phase("evaluate", what, stage=plan.stage, client=client, done=number, total=len(clients)))
        decoder = Decoder(alone_model(model, plan, config, client, run), federation.device)
        yield client, {name: negative_log_likelihoods(decoder, texts) for name, texts in windows.items()}


def alone_model(model: Checkpoint, plan: Plan, config: Config, client: str, run: RunFolder) -> Checkpoint:
    """The model cut by the sums of one client alone.

    Args:
        model: the model at the start of the stage.

    Raises:
        FedgroveError: the client sent no sums.
    """
    sums = _read_sums(_sums_file(run, plan), f"{client}/")
    if not sums:
        raise FedgroveError("it sent no sums, so its model alone cannot be measured (evaluate.alone)", client=client)
    overlay = run.path / "work" / f"stage-{plan.stage}" / "alone" / client
    _cut(model, plan, config, sums, overlay)
    return model.over(overlay, width=plan.after)


def typical_memory(decoder: Decoder, length: int) -> dict[str, float]:
    """For a quarter of the channels and heads; empty for architectures that cannot be cut."""
    config = Config(kind="structured", length=length)
    try:
        return {"cut channels and heads": float(make_plan(0, config, decoder, {"one": Capabilities()}).clients["one"].memory)}
    except FedgroveError:
        return {}


class _Scores(IntegerSums):
    """The sums over all clients and, for ``evaluate.alone``, the sums of each client."""

    def __init__(self, signed: bool, keep_parts: bool):
        super().__init__(lambda sums, replies: check_values(sums, signed, LARGEST))
        self.parts: Tensors = {}
        self._keep_parts = keep_parts

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        if self._keep_parts:
            self.parts |= {f"{client}/{name}": tensor for name, tensor in tensors.items()}
        super().add(client, tensors, reply)


def _collect(model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> tuple[list[str], int, Tensors]:
    """The clients in the sums, their number of tokens, and the sums; for ``evaluate.alone`` also those of each client."""
    messages = {client: Message(score_request(plan, config, client, federation.job)) for client in plan.clients}
    scores = _Scores(score_of(config.score).SIGNED, federation.job.evaluate.alone)
    replies = federation.aggregator.aggregate(messages, scores, layout=Decoder(model, federation.device))
    tokens = sum(reply.tokens for reply in replies.values() if isinstance(reply, Tokens))
    return sorted(replies), tokens, {CHANGE + name: value for name, value in scores.sums.items()} | scores.parts


def score_request(plan: Plan, config: Config, client: str, job: Job) -> ScoreGroups:
    """The request to one client."""
    calibration = Calibration(
        stage=plan.stage,
        samples=plan.clients[client].samples,
        length=config.length,
        seed=calibration_seed(job.seed, plan.stage),
        through="gradients",
    )
    return ScoreGroups(stage=plan.stage, score=config.score, calibration=calibration, limit=LARGEST // len(plan.clients))


def _cut(
    model: Checkpoint,
    plan: Plan,
    config: Config,
    sums: Mapping[str, Tensor],
    overlay: Path,
    run: RunFolder | None = None,
) -> list[dict[str, Any]]:
    """Cuts every block that is not cut yet; returns for each block the indices of the groups that are cut."""
    decoder = Decoder(model)
    score = score_of(config.score)
    records: list[dict[str, Any]] = []
    for block in range(plan.num_blocks):
        kept: Kept = {}
        record: dict[str, Any] = {"block": block}
        for kind in ("channels", "heads"):
            before, after = getattr(plan.before, kind), getattr(plan.after, kind)
            kept[kind] = torch.arange(before)
            if after < before:
                gone = lowest([score.finish(CODE.decode(sums[f"{CHANGE}{block}/{kind}"]))], before - after)
                kept[kind] = (~gone).nonzero().squeeze(1)
                record[kind] = gone.nonzero().squeeze(1).tolist()
        records.append(record)
        file = overlay / f"block-{block:04d}.safetensors"
        if not file.is_file():
            if run:
                run.phase(Phase("structured", stage=plan.stage, block=block, blocks=plan.num_blocks))
            save_tensors(cut_block(decoder, block, kept), file)
    return records


def cut_block(decoder: Decoder, block: int, kept: Kept) -> dict[str, Tensor]:
    """The tensors of a block that change, with only the groups ``kept``; names and layout are those of the checkpoint."""
    config = decoder.checkpoint.config
    family, width, names = family_of(config), width_of(config), decoder.block_names(block)
    cut: dict[str, Tensor] = {}
    for kind, part in (("channels", family.channels), ("heads", family.heads)):
        number = getattr(width, kind)
        if part is None or len(kept[kind]) == number:
            continue
        for name in part.producers:
            module = decoder.blocks[block].get_submodule(name)
            weight = cut_rows(decoder.read_linear(block, name), number, kept[kind])
            cut[names[name]] = as_matrix(module, weight).contiguous()
            if getattr(module, "bias", None) is not None:
                bias = names[name].removesuffix("weight") + "bias"
                cut[bias] = cut_rows(decoder.checkpoint.read(bias), number, kept[kind])
        module = decoder.blocks[block].get_submodule(part.consumer)
        weight = cut_columns(decoder.read_linear(block, part.consumer), number, kept[kind])
        cut[names[part.consumer]] = as_matrix(module, weight).contiguous()
    return cut


def _sums_file(run: RunFolder, plan: Plan) -> Path:
    return run.path / "work" / f"stage-{plan.stage}" / "sums.safetensors"


def _read_sums(file: Path, prefix: str = "") -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {
            name.removeprefix(prefix): opened.get_tensor(name)
            for name in opened.keys()  # noqa: SIM118
            if name.startswith(prefix + CHANGE)
        }
