"""The stage ``structured``: clients score channels, heads and blocks, or experts; the server cuts the same number of channels,
heads or experts out of every block, and whole blocks, and repairs the linears that read what was cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.events import Phase
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.compute import dtype_of
from fedgrove.models.cost import count_parameters
from fedgrove.models.expert_sums import blocks_with_experts
from fedgrove.models.perplexity import negative_log_likelihoods
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.runfolder import RunFolder
from fedgrove.stages.base import Losses, Result
from fedgrove.stages.structured import expert_plan
from fedgrove.stages.structured.choice import (
    BLOCKS,
    EXPERTS,
    GROUPS,
    choose,
    collect_scores,
    expert_records,
    mean_influence,
    metadata,
    sums_file,
)
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.narrow import alone_overlay, cut_alone, cut_blocks, read_record
from fedgrove.stages.structured.plan import Plan, make_plan


def plan(index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], job: Job) -> Plan:
    """See :func:`fedgrove.stages.structured.plan.make_plan`, and that of ``expert_plan`` for experts."""
    if not config.experts and not config.narrows and blocks_with_experts(decoder):
        return expert_plan.make_depth_plan(index, config, decoder, capabilities, index == len(job.stages) - 1)
    make = expert_plan.make_plan if config.experts else make_plan
    return make(index, config, decoder, capabilities, job.privacy.secure_aggregation)


def run(model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> Result:
    """Cuts a model down to the plan's number of blocks and their widths, so that one plain config.json describes it.

    Each client gets one request for the scores of all blocks, one for those of all channels and heads, and one for each block
    that is repaired; or one for those of all experts. All is measured on the model at the start of the stage. The sums of the
    scores are files in the run folder, and so is each block that was narrowed, so an interrupted stage continues from these
    files.

    Returns:
        The smaller model, its narrower blocks as an overlay; experts that stay are read from the model as it was.
        ``RUN/structured.json`` records what was cut.
    """
    run = federation.run
    if config.depth:
        collect_scores(BLOCKS, model, plan, config, federation)
    if config.narrows:
        collect_scores(GROUPS, model, plan, config, federation)
    if config.experts:
        collect_scores(EXPERTS, model, plan, config, federation)
    choice = choose(run, plan, config)
    result = model.over(kept_blocks=choice.blocks if config.depth else None, kept_experts=choice.experts)
    records: list[dict[str, Any]] = [{"block": block} for block in choice.blocks]
    if config.experts:
        records = expert_records(run, plan, choice)
    if config.narrows:
        overlay = run.overlay(plan.stage, 0)
        cut_blocks(model, plan, config, choice, overlay, federation)
        records = [read_record(plan, choice, block, overlay) for block in choice.blocks]
        result = result.over(overlay, width=plan.after)
    files = {what: sums_file(run, plan, what) for what in (BLOCKS, GROUPS, EXPERTS)}
    run.write_json(
        "structured.json",
        {
            "stage": plan.stage,
            **config.model_dump(mode="json"),
            "sums": {what: metadata(file) for what, file in files.items() if file.is_file()},
            "num_blocks": [plan.num_blocks, plan.blocks_left],
            "kept_blocks": list(choice.blocks),
            "influence": mean_influence(run, plan) if config.depth else None,
            "before": None if plan.before is None else asdict(plan.before),
            "after": None if plan.after is None else asdict(plan.after),
            "num_experts": None if plan.experts is None else [plan.experts.before, plan.experts.after],
            "queries": plan.queries,
            "parameters": [plan.parameters[0], count_parameters(Decoder(result))],
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
    """Cuts the model by each client's own sums and measures it. The server had these sums, so clients get no request."""
    run = federation.run
    for number, client in enumerate(clients):
        what = f"what {client} would have had alone"
        run.phase(Phase("evaluate", what, stage=plan.stage, client=client, done=number, total=len(clients)))
        dtype = dtype_of(run.job.evaluate.compute_dtype, federation.device)
        decoder = Decoder(alone_model(model, plan, config, client, run), federation.device, dtype)
        yield client, {name: negative_log_likelihoods(decoder, texts) for name, texts in windows.items()}


def alone_model(model: Checkpoint, plan: Plan, config: Config, client: str, run: RunFolder) -> Checkpoint:
    """The model cut, and repaired, by the sums of one client alone.

    Args:
        model: the model at the start of the stage.

    Raises:
        FedgroveError: the client sent no sums.
    """
    choice = choose(run, plan, config, client)
    result = model.over(kept_blocks=choice.blocks if config.depth else None, kept_experts=choice.experts)
    if not config.narrows:
        return result
    cut_alone(model, plan, config, choice, client, run)
    return result.over(alone_overlay(run, plan, client), width=plan.after)


def typical_memory(decoder: Decoder, length: int) -> dict[str, float]:
    """For a quarter of the channels and heads; empty for architectures that cannot be cut."""
    config = Config(kind="structured", length=length, samples=2**10)  # enough for a repair; memory does not depend on it
    try:
        return {"cut channels and heads": float(make_plan(0, config, decoder, {"one": Capabilities()}).clients["one"].memory)}
    except FedgroveError:
        return {}
