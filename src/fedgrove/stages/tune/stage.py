"""The stage ``tune``: in every round clients train on their own text, and the server aggregates their changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedgrove.evaluation.alone import losses_of, number_of, tensors_of
from fedgrove.events import Phase
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import measure_cost
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import Message
from fedgrove.runfolder import RunFolder
from fedgrove.stages.base import Losses, Result
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.cost import ClientConfig, SearchSpace, memory
from fedgrove.stages.tune.exchanges.alone import OwnLoss
from fedgrove.stages.tune.loops import loop_of
from fedgrove.stages.tune.parametrizations import parametrization_of
from fedgrove.stages.tune.plan import Plan, even, make_plan
from fedgrove.stages.tune.pool.plan import with_pool
from fedgrove.stages.tune.seeds.targets import check_targets
from fedgrove.stages.tune.state import TuningState
from fedgrove.stages.tune.tuning import pruned_linears

TYPICAL_RANK = 8  # for ``fedgrove doctor``


def plan(index: int, config: Config, decoder: Decoder, capabilities: Mapping[str, Capabilities], job: Job) -> Plan:
    """See :func:`fedgrove.stages.tune.plan.make_plan`; all linears have the same importance until it is measured."""
    check_targets(index, config.target_modules, decoder)
    zeros = any(stage.makes_zeros() for stage in job.stages[:index]) or bool(pruned_linears(decoder))
    cost = measure_cost(decoder, config.length, zeros)
    secure = job.privacy.secure_aggregation
    alone = job.evaluate.measures_alone and index == 0
    planned = make_plan(
        index,
        config,
        cost,
        capabilities,
        even(cost),
        together=job.together,
        secure=secure,
        alone=alone,
        min_group=job.privacy.min_group,
    )
    return planned if config.pool is None else with_pool(planned, config.pool, decoder, job)


def run(model: Checkpoint, plan: Plan, config: Config, federation: Federation) -> Result:
    """Tunes a model with the plan's clients.

    After every round the state is written to the run folder, so that a killed stage resumes with the next round. An
    interrupted round is repeated and gives the same bits. A client that fails is named and left out of the round, as
    long as ``rounds.quorum`` clients respond.

    Returns:
        The model with the changes merged, in its own dtype, as an overlay; and the PEFT adapter in ``RUN/adapter``, if
        the parametrization has adapters.
    """
    run = federation.run
    for client, why in sorted(plan.left_out.items()):
        run.message(f"tune: client '{client}' is left out: {why}")
    done = [round_ for round_ in range(config.rounds) if _file(run, plan.stage, round_).is_file()]
    state = TuningState.read(_file(run, plan.stage, done[-1])) if done else TuningState(plan)
    loop = loop_of(config.loop)
    stage = loop(model, Decoder(model, federation.device), config, federation, state)
    stage.write_plan()
    if done:
        stage.log(done[-1])
        stage.evaluate(done[-1])
    if len(done) < config.rounds:
        stage.send_base()
        stage.hold_experts()
        for round_ in range(len(done), config.rounds):
            state.metrics.clear()
            stage.prepare(round_, again=round_ in config.planning_rounds)
            run.phase(Phase("tune", stage=plan.stage, round=round_, rounds=config.rounds))
            stage.train_round(round_)
            state.write(_file(run, plan.stage, round_))
            stage.log(round_)
            stage.evaluate(round_)
    stage.finish()
    overlay = run.overlay(plan.stage, config.rounds)
    stage.merge(overlay)
    adapter = stage.write_adapter()
    return Result(model.over(overlay), {} if adapter is None else {"adapter": adapter})


def alone(
    model: Checkpoint,
    plan: Plan,
    config: Config,
    clients: Sequence[str],
    windows: Mapping[str, list[Tensor]],
    federation: Federation,
) -> Iterator[tuple[str, Losses]]:
    """Lets each client train alone for as many steps, by the plan of the last round, and measure what it gets.

    With ``personal``, the loss on the client's own held-out windows is logged as ``personal/alone``.
    """
    if not parametrization_of(config.parametrization).ALONE:
        return
    run = federation.run
    run.phase(Phase("evaluate", "what each client would have had alone", stage=plan.stage))
    state = TuningState.read(_file(run, plan.stage, config.rounds - 1))
    loop = loop_of(config.loop)
    stage = loop(model, Decoder(model, federation.device), config, federation, state)
    tensors, numbers = tensors_of(windows), number_of(windows)
    messages = {client: Message(stage.alone_request(client, numbers), tensors) for client in clients}
    done = {line["client"] for line in run.metrics() if (line["stage"], line["name"]) == (plan.stage, "personal/alone")}
    for client, answer, reply in federation.collect(messages):
        assert isinstance(reply, OwnLoss)
        if reply.own is not None and client not in done:
            run.log(plan.stage, None, client, "personal/alone", reply.own)
        yield client, losses_of(answer, windows)


def typical_memory(decoder: Decoder, length: int) -> dict[str, float]:
    """Bytes for LoRA of rank ``TYPICAL_RANK`` on a pruned model, one window at once."""
    cost = measure_cost(decoder, length, masked=True)
    space = SearchSpace((32, 16, 8, 4), (1,), (TYPICAL_RANK,), 1)
    rank = min(TYPICAL_RANK, *(min(shape) for shape in cost.linears.values()))
    ranks = dict.fromkeys(cost.linears, rank)
    return {f"tune in {bits} bits": memory(cost, space, ClientConfig(bits, 1, 1, ranks)) for bits in space.bits}


def _file(run: RunFolder, stage: int, round_: int) -> Path:
    return run.path / "work" / f"stage-{stage}" / f"changes-{round_:04d}.safetensors"
