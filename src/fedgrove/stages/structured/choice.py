"""Which blocks, groups and experts go: the clients' scores of them, and the choice by the sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedgrove.client.hidden_states import Calibration, Tokens
from fedgrove.errors import FedgroveError
from fedgrove.events import Phase
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import KeptExperts, highest_experts, routing_of
from fedgrove.models.expert_sums import TOKENS
from fedgrove.models.masks import lowest
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import CHANGE, Message, Reply, Request, Tensors
from fedgrove.runfolder import RunFolder
from fedgrove.stages.base import calibration_seed
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.cut import KINDS, Kept
from fedgrove.stages.structured.exchanges.blocks import INFLUENCE, ScoreBlocks, check_influence
from fedgrove.stages.structured.exchanges.experts import CODES, ScoreExperts, check_sums
from fedgrove.stages.structured.exchanges.scores import CODE, LARGEST, ScoreGroups, check_values
from fedgrove.stages.structured.expert_scores import expert_score_of
from fedgrove.stages.structured.plan import Plan
from fedgrove.stages.structured.scores import score_of

BLOCKS, GROUPS, EXPERTS = "blocks", "groups", "experts"  # what is scored; also the names of the files of the sums


@dataclass(frozen=True)
class Choice:
    """What stays of a model.

    Attributes:
        blocks: the indices of its blocks, ascending.
        groups: for each of these blocks, the groups of each kind; None: all.
        experts: for each of these blocks that has experts, the indices of those that stay, ascending; None: all.
    """

    blocks: tuple[int, ...]
    groups: Mapping[int, Kept] | None = None
    experts: KeptExperts | None = None


def choose(run: RunFolder, plan: Plan, config: Config, client: str | None = None) -> Choice:
    """What stays by the sums of all clients, or of one client alone.

    Raises:
        FedgroveError: the client sent no sums.
    """
    blocks: tuple[int, ...] = tuple(range(plan.num_blocks))
    if config.depth:
        influence = _read_sums(run, plan, BLOCKS, client)[CHANGE + INFLUENCE]
        blocks = kept_blocks(influence, plan.num_blocks, plan.blocks_left, config.protect_ends, plan.without_experts)
    if config.experts:
        return Choice(blocks, experts=_choose_experts(run, plan, config, client))
    if not config.narrows:
        return Choice(blocks)
    assert plan.before is not None
    assert plan.after is not None
    score, sums = score_of(config.score), _read_sums(run, plan, GROUPS, client)
    groups: dict[int, Kept] = {}
    for block in blocks:
        groups[block] = {}
        for kind in KINDS:
            before, after = getattr(plan.before, kind), getattr(plan.after, kind)
            groups[block][kind] = torch.arange(before)
            if after < before:
                total = sums[f"{CHANGE}{plan.first_uses[kind][block]}/{kind}"]
                groups[block][kind] = kept_groups(score.finish(CODE.decode(total)), after)
    return Choice(blocks, groups)


def _choose_experts(run: RunFolder, plan: Plan, config: Config, client: str | None) -> KeptExperts:
    assert plan.experts is not None
    score, cut = expert_score_of(config.expert_score), plan.experts
    sums = expert_sums_of(run, plan, client)
    scores = [score.finish({name: values[row] for name, values in sums.items()}) for row in range(len(cut.blocks))]
    return {block: highest_experts(one, cut.after, cut.groups) for block, one in zip(cut.blocks, scores, strict=True)}


def expert_sums_of(run: RunFolder, plan: Plan, client: str | None = None) -> dict[str, Tensor]:
    """The sums over the tokens of experts, (blocks with experts, experts) float64 by name: of all clients, or of one.

    Raises:
        FedgroveError: the client sent no sums.
    """
    sums = {name.removeprefix(CHANGE): values for name, values in _read_sums(run, plan, EXPERTS, client).items()}
    return {name: CODES[name].decode(values) for name, values in sums.items()}


def expert_records(run: RunFolder, plan: Plan, choice: Choice) -> list[dict[str, Any]]:
    """Of every block, the experts that are cut, and which part of the router's choices they were before."""
    assert choice.experts is not None
    records: list[dict[str, Any]] = [{"block": block} for block in choice.blocks]
    tokens = expert_sums_of(run, plan)[TOKENS]
    for (block, kept), of_experts in zip(choice.experts.items(), tokens, strict=True):
        gone = torch.ones(len(of_experts), dtype=torch.bool)
        gone[list(kept)] = False
        records[block]["experts"] = gone.nonzero().flatten().tolist()
        records[block]["routed"] = round(float(of_experts[gone].sum() / of_experts.sum()), 6)
    return records


def kept_groups(scores: Tensor, number: int) -> Tensor:
    """The indices of the groups that stay, ascending: all but the ``len(scores) − number`` of the lowest score."""
    gone = lowest([scores], len(scores) - number)
    return (~gone).nonzero().squeeze(1)


def kept_blocks(
    influence: Tensor, num_blocks: int, number: int, protect_ends: bool, others: Collection[int] = ()
) -> tuple[int, ...]:
    """The indices of the blocks that stay, ascending.

    Args:
        influence: of each block, (num_blocks,), or of each run of ``num_blocks − number`` blocks, by its first block.
        num_blocks: the number of blocks.
        number: how many of them stay.
        protect_ends: whether the first and the last block stay; others: indices of further blocks that stay.
    """
    span = num_blocks - len(influence) + 1
    stay = {*others, *((0, num_blocks - 1) if protect_ends else ())}
    free = [first for first in range(len(influence)) if stay.isdisjoint(range(first, first + span))]
    at = torch.tensor(free)
    cut = at[lowest([influence[at]], (num_blocks - number) // span)]
    gone = {block for first in cut.tolist() for block in range(first, first + span)}
    return tuple(block for block in range(num_blocks) if block not in gone)


def collect_scores(what: str, model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> None:
    """Requests the scores of what may go, and writes their sums to the run folder unless they are there already.

    Args:
        what: ``BLOCKS``, ``GROUPS`` or ``EXPERTS``.
    """
    run, file = federation.run, sums_file(federation.run, plan, what)
    if file.is_file():
        return
    titles = {
        BLOCKS: "measuring how much each block changes the hidden states",
        GROUPS: "measuring how much each channel and head matters",
        EXPERTS: "measuring how much each expert adds",
    }
    requests: dict[str, Callable[[Plan, Config, str, Job], Request]] = {
        BLOCKS: block_request,
        GROUPS: score_request,
        EXPERTS: expert_request,
    }
    run.phase(Phase("structured", titles[what], stage=plan.stage))
    messages = {client: Message(requests[what](plan, config, client, federation.job)) for client in plan.clients}

    def check_total(sums: Tensors, replies: Mapping[str, Reply]) -> None:
        windows = sum(plan.clients[client].samples for client in replies)
        if what == BLOCKS:
            check_influence(sums, windows * config.length, windows)
        elif what == EXPERTS:
            check_sums(sums, windows * config.length, routing_of(model.config).per_token, LARGEST)
        else:
            check_values(sums, score_of(config.score).SIGNED, LARGEST)

    scores = IntegerSums(check_total, keep_parts=federation.job.evaluate.alone)
    replies = federation.aggregator.aggregate(messages, scores, layout=Decoder(model, federation.device))
    tokens = sum(reply.tokens for reply in replies.values() if isinstance(reply, Tokens))
    sums = {CHANGE + name: value for name, value in scores.sums.items()}
    sums |= {f"{client}/{CHANGE}{name}": value for client, parts in scores.parts.items() for name, value in parts.items()}
    save_tensors(sums, file, {"clients": json.dumps(sorted(replies)), "tokens": str(tokens)})


def block_request(plan: Plan, config: Config, client: str, job: Job) -> ScoreBlocks:
    """The request to one client for the influence of every block, or of every run of blocks."""
    span = plan.num_blocks - plan.blocks_left if config.contiguous else 1
    return ScoreBlocks(stage=plan.stage, span=span, calibration=calibration_of(plan, config, client, job, "dense"))


def score_request(plan: Plan, config: Config, client: str, job: Job) -> ScoreGroups:
    """The request to one client for the scores of all channels and heads."""
    calibration = calibration_of(plan, config, client, job, "gradients")
    return ScoreGroups(stage=plan.stage, score=config.score, calibration=calibration, limit=LARGEST // len(plan.clients))


def expert_request(plan: Plan, config: Config, client: str, job: Job) -> ScoreExperts:
    """The request to one client for the sums over the tokens of all experts."""
    return ScoreExperts(
        stage=plan.stage,
        score=config.expert_score,
        calibration=calibration_of(plan, config, client, job, "dense"),
        limit=LARGEST // len(plan.clients),
    )


def calibration_of(plan: Plan, config: Config, client: str, job: Job, through: str) -> Calibration:
    """The windows of one client; ``through``: see :class:`~fedgrove.client.hidden_states.Calibration`."""
    return Calibration(
        stage=plan.stage,
        samples=plan.clients[client].samples,
        length=config.length,
        seed=calibration_seed(job.seed, plan.stage),
        through=through,
    )


def mean_influence(run: RunFolder, plan: Plan) -> list[float]:
    """The mean influence over all clients' tokens of each block, or of each run of blocks."""
    sums = _read_sums(run, plan, BLOCKS)[CHANGE + INFLUENCE]
    return [round(float(value), 6) for value in CODE.decode(sums) / metadata(sums_file(run, plan, BLOCKS))["tokens"]]


def sums_file(run: RunFolder, plan: Plan, what: str) -> Path:
    """Where the sums of the scores are stored, and with ``evaluate.alone`` those of each client."""
    return run.path / "work" / f"stage-{plan.stage}" / f"{what}.safetensors"


def metadata(file: Path) -> dict[str, Any]:
    """The clients in the sums of a file, and their number of tokens."""
    with safe_open(file, framework="pt") as opened:
        return {name: json.loads(opened.metadata()[name]) for name in ("clients", "tokens")}


def _read_sums(run: RunFolder, plan: Plan, what: str, client: str | None = None) -> dict[str, Tensor]:
    """The sums of all clients, or of one.

    Raises:
        FedgroveError: the client sent no sums.
    """
    prefix = "" if client is None else f"{client}/"
    with safe_open(sums_file(run, plan, what), framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(prefix + CHANGE)]  # noqa: SIM118
        if not names:
            raise FedgroveError("it sent no sums, so its model alone cannot be measured (evaluate.alone)", client=client)
        return {name.removeprefix(prefix): opened.get_tensor(name) for name in names}
