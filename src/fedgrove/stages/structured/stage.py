"""The stage ``structured``: clients score channels, heads and blocks; the server cuts the same number of channels and heads
out of every block, and whole blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import negative_log_likelihoods
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import CHANGE, Message, Reply, Tensors
from fedgrove.runfolder import RunFolder
from fedgrove.stages.base import Losses, Result, calibration_seed
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.cut import Kept, cut_block, kept_blocks, kept_groups
from fedgrove.stages.structured.exchanges.blocks import INFLUENCE, ScoreBlocks, check_influence
from fedgrove.stages.structured.exchanges.scores import CODE, LARGEST, ScoreGroups, Tokens, check_values
from fedgrove.stages.structured.plan import Plan, make_plan
from fedgrove.stages.structured.scores import score_of

BLOCKS, GROUPS = "blocks", "groups"  # what is scored; also the names of the files of the sums


def plan(index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], job: Job) -> Plan:
    """See :func:`fedgrove.stages.structured.plan.make_plan`."""
    return make_plan(index, config, decoder, capabilities, job.privacy.secure_aggregation)


def run(model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> Result:
    """Cuts a model down to the plan's number of blocks and their widths, so that one plain config.json describes it.

    Each client gets one request for the scores of all blocks, and one for those of all channels and heads. Both are measured on
    the model at the start of the stage. The sums of the responses are files in the run folder, and so is each block that was
    cut, so an interrupted stage continues from these files.

    Returns:
        The smaller model, its narrower blocks as an overlay. ``RUN/structured.json`` records what was cut.
    """
    run = federation.run
    if config.depth:
        _collect(BLOCKS, model, plan, config, federation)
    if config.narrows:
        _collect(GROUPS, model, plan, config, federation)
    result, kept, records = _cut(model, plan, config, run, run.overlay(plan.stage, 0))
    files = {what: _sums_file(run, plan, what) for what in (BLOCKS, GROUPS)}
    run.write_json(
        "structured.json",
        {
            "stage": plan.stage,
            **config.model_dump(mode="json"),
            "sums": {what: _metadata(file) for what, file in files.items() if file.is_file()},
            "num_blocks": [plan.num_blocks, plan.blocks_left],
            "kept_blocks": list(kept),
            "influence": _influence(run, plan) if config.depth else None,
            "before": asdict(plan.before),
            "after": asdict(plan.after),
            "queries": plan.queries,
            "parameters": list(plan.parameters),
            "bytes": [model.num_bytes(), result.num_bytes()],
            "types": list(plan.types),
            "blocks": records,
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
    overlay = run.path / "work" / f"stage-{plan.stage}" / "alone" / client
    return _cut(model, plan, config, run, overlay, client)[0]


def typical_memory(decoder: Decoder, length: int) -> dict[str, float]:
    """For a quarter of the channels and heads; empty for architectures that cannot be cut."""
    config = Config(kind="structured", length=length)
    try:
        return {"cut channels and heads": float(make_plan(0, config, decoder, {"one": Capabilities()}).clients["one"].memory)}
    except FedgroveError:
        return {}


class _Scores(IntegerSums):
    """The sums over all clients and, for ``evaluate.alone``, the sums of each client."""

    def __init__(self, check_total: Callable[[Tensors, Mapping[str, Reply]], None], keep_parts: bool):
        super().__init__(check_total)
        self.parts: Tensors = {}
        self._keep_parts = keep_parts

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        if self._keep_parts:
            self.parts |= {f"{client}/{name}": tensor for name, tensor in tensors.items()}
        super().add(client, tensors, reply)


def _collect(what: str, model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> None:
    """Requests the scores of blocks or of groups, and writes their sums to the run folder unless they are there already."""
    run, file = federation.run, _sums_file(federation.run, plan, what)
    if file.is_file():
        return
    titles = {
        BLOCKS: "measuring how much each block changes the hidden states",
        GROUPS: "measuring how much each channel and head matters",
    }
    run.phase(Phase("structured", titles[what], stage=plan.stage))
    request = block_request if what == BLOCKS else score_request
    messages = {client: Message(request(plan, config, client, federation.job)) for client in plan.clients}

    def check_total(sums: Tensors, replies: Mapping[str, Reply]) -> None:
        if what == BLOCKS:
            windows = sum(plan.clients[client].samples for client in replies)
            check_influence(sums, windows * config.length, windows)
        else:
            check_values(sums, score_of(config.score).SIGNED, LARGEST)

    scores = _Scores(check_total, federation.job.evaluate.alone)
    replies = federation.aggregator.aggregate(messages, scores, layout=Decoder(model, federation.device))
    tokens = sum(reply.tokens for reply in replies.values() if isinstance(reply, Tokens))
    sums = {CHANGE + name: value for name, value in scores.sums.items()} | scores.parts
    save_tensors(sums, file, {"clients": json.dumps(sorted(replies)), "tokens": str(tokens)})


def block_request(plan: Plan, config: Config, client: str, job: Job) -> ScoreBlocks:
    """The request to one client for the influence of every block, or of every run of blocks."""
    span = plan.num_blocks - plan.blocks_left if config.contiguous else 1
    return ScoreBlocks(stage=plan.stage, span=span, calibration=_calibration(plan, config, client, job, "dense"))


def score_request(plan: Plan, config: Config, client: str, job: Job) -> ScoreGroups:
    """The request to one client for the scores of all channels and heads."""
    calibration = _calibration(plan, config, client, job, "gradients")
    return ScoreGroups(stage=plan.stage, score=config.score, calibration=calibration, limit=LARGEST // len(plan.clients))


def _calibration(plan: Plan, config: Config, client: str, job: Job, through: str) -> Calibration:
    return Calibration(
        stage=plan.stage,
        samples=plan.clients[client].samples,
        length=config.length,
        seed=calibration_seed(job.seed, plan.stage),
        through=through,
    )


def _cut(
    model: Checkpoint, plan: Plan, config: Config, run: RunFolder, overlay: Path, client: str | None = None
) -> tuple[Checkpoint, tuple[int, ...], list[dict[str, Any]]]:
    """Cuts everything that is not cut yet.

    Args:
        model: the model at the start of the stage.
        overlay: the folder of the blocks that were cut.
        client: cut by the sums of this client alone; None: by those of all clients.

    Returns:
        The smaller model, the blocks that stay, and for each of these the indices of the groups that were cut.
    """
    kept: tuple[int, ...] = tuple(range(plan.num_blocks))
    if config.depth:
        influence = _read_sums(run, plan, BLOCKS, client)[CHANGE + INFLUENCE]
        kept = kept_blocks(influence, plan.num_blocks, plan.blocks_left, config.protect_ends)
    shorter = model.over(kept_blocks=kept if config.depth else None)
    records: list[dict[str, Any]] = [{"block": block} for block in kept]
    if not config.narrows:
        return shorter, kept, records
    decoder, score = Decoder(shorter), score_of(config.score)
    sums = _read_sums(run, plan, GROUPS, client)
    for index, record in enumerate(records):
        groups: Kept = {}
        for kind in ("channels", "heads"):
            before, after = getattr(plan.before, kind), getattr(plan.after, kind)
            groups[kind] = torch.arange(before)
            if after < before:
                groups[kind] = kept_groups(score.finish(CODE.decode(sums[f"{CHANGE}{record['block']}/{kind}"])), after)
                record[kind] = sorted(set(range(before)) - set(groups[kind].tolist()))
        file = overlay / f"block-{index:04d}.safetensors"
        if not file.is_file():
            if client is None:
                run.phase(Phase("structured", stage=plan.stage, block=index, blocks=plan.blocks_left))
            save_tensors(cut_block(decoder, index, groups), file)
    return shorter.over(overlay, width=plan.after), kept, records


def _influence(run: RunFolder, plan: Plan) -> list[float]:
    """The mean influence over all clients' tokens of each block, or of each run of blocks."""
    sums = _read_sums(run, plan, BLOCKS)[CHANGE + INFLUENCE]
    return [round(float(value), 6) for value in CODE.decode(sums) / _metadata(_sums_file(run, plan, BLOCKS))["tokens"]]


def _sums_file(run: RunFolder, plan: Plan, what: str) -> Path:
    return run.path / "work" / f"stage-{plan.stage}" / f"{what}.safetensors"


def _metadata(file: Path) -> dict[str, Any]:
    """The clients in the sums of a file, and their number of tokens."""
    with safe_open(file, framework="pt") as opened:
        return {name: json.loads(opened.metadata()[name]) for name in ("clients", "tokens")}


def _read_sums(run: RunFolder, plan: Plan, what: str, client: str | None = None) -> dict[str, Tensor]:
    """The sums of all clients, or of one.

    Raises:
        FedgroveError: the client sent no sums.
    """
    prefix = "" if client is None else f"{client}/"
    with safe_open(_sums_file(run, plan, what), framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(prefix + CHANGE)]  # noqa: SIM118
        if not names:
            raise FedgroveError("it sent no sums, so its model alone cannot be measured (evaluate.alone)", client=client)
        return {name.removeprefix(prefix): opened.get_tensor(name) for name in names}
