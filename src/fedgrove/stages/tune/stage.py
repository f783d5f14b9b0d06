"""The stage ``tune``: in every round clients train adapters on their own text, and the server makes one of theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedgrove import plugins
from fedgrove.engines.base import Engine
from fedgrove.job import TuneStage
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.stream import Checkpoint, save_tensors
from fedgrove.rounds.collect import Message, ask
from fedgrove.rounds.clock import Clock, Pace
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.wire import CHANGE, WEIGHT, Info, WireError
from fedgrove.rounds.wire import check as check_tensors
from fedgrove.stages.tune.aggregation import Options, State
from fedgrove.runfolder import RunFolder
from fedgrove.evaluation.evaluate import evaluate_round
from fedgrove.stages.tune.fixed_point_stage import private_facts, sum_whole, whole_facts
from fedgrove.stages.tune import importance as scoring
from fedgrove.stages.tune import fixed_point as whole
from fedgrove.stages.tune.factors import Factors, fill
from fedgrove.stages.tune.lora import merge
from fedgrove.stages.tune.server_optimizers import ServerOptimizerState, step
from fedgrove.stages.tune.plan import TunePlan, TuneAssignment, make_tune_plan, measure, importance_seconds, worth

FEW_ZEROS = 0.001  # a linear with more of them was pruned, and keeps them
HYSTERESIS = 1.05  # a new plan must be worth so much more than the old one, or the old one stays
KEPT_SCORE = 0.5  # of the old importance in the new


@dataclass
class TuningState:
    """A tuning stage between two rounds: what a killed run goes on from.

    Attributes:
        plan: the configuration that is in force.
        states: by linear, the adapter; dense: by linear, the change, where whole linears are trained.
        memories: by linear, the server optimizer's.
        seen: windows that each client was given.
        clock: modelled seconds.
        metrics: what the latest round measured: (client, name, value).
    """

    plan: TunePlan
    states: dict[str, State] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    memories: dict[str, ServerOptimizerState] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    clock: float = 0.0
    metrics: list[tuple[str | None, str, float]] = field(default_factory=list)


def tune(model: Checkpoint, plan: TunePlan, engine: Engine, run: RunFolder) -> Checkpoint:
    """Tunes a model with the plan's clients.

    After every round the adapters are a file in the run folder, so a stage that was killed goes on with the next round; a
    round that was cut short is asked anew and comes to the same bits. A client that fails is named and left out of the
    round while ``rounds.quorum`` holds.

    Returns:
        The model with the changes merged, in its own dtype, laid over it. ``RUN/adapter`` holds them as a PEFT adapter.
    """
    stage = run.job.tuning(plan.stage)
    decoder = Decoder(model)
    masked = pruned_linears(decoder)
    for client, why in sorted(plan.left_out.items()):
        run.say(f"tune: client '{client}' is left out: {why}")
    done = [r for r in range(stage.rounds) if _file(run, plan.stage, r).is_file()]
    progress = _read(_file(run, plan.stage, done[-1]), plan) if done else TuningState(plan)
    if done:
        _log(progress, plan.stage, done[-1], run)
        _measure(model, decoder, progress, done[-1], stage, masked, run)
    if len(done) < stage.rounds:
        parts, took = _give_base(decoder, model, plan, engine, run)
        progress.clock += 0.0 if done else took
        for round_ in range(len(done), stage.rounds):
            progress.metrics.clear()
            if stage.method == "fedpipe" and (round_ == 0 or (stage.replan_every and round_ % stage.replan_every == 0)):
                _plan_anew(decoder, progress, round_, stage, parts, masked, engine, run)
            run.step(f"tune: round {round_ + 1} of {stage.rounds}", round_, stage.rounds)
            _train_round(decoder, progress, round_, stage, parts, masked, engine, run)
            _write(_file(run, plan.stage, round_), progress)
            _log(progress, plan.stage, round_, run)
            _measure(model, decoder, progress, round_, stage, masked, run)
    run.write_json(f"plan-{plan.stage}-tune.json", progress.plan.model_dump(mode="json"))
    if stage.personal:
        _keep_personal(decoder, model, progress, stage, masked, engine, run)
    overlay = run.overlay(plan.stage, stage.rounds)
    _merge(decoder, progress, masked, overlay, run)
    if not progress.dense:
        from fedgrove.stages.tune.peft_adapter import write_adapter

        totals = {name: state.total() for name, state in progress.states.items()}
        base, title = run.job.model.path, f"{run.job.name}: adapter"
        write_adapter(run.path / "adapter", decoder, totals, base, title, pruned=bool(masked), changed=bool(model.changed()))
    return model.over(overlay)


def _keep_personal(
    decoder: Decoder, model: Checkpoint, progress: TuningState, stage: TuneStage, masked: list[str], engine: Engine, run: RunFolder
) -> None:
    """Lets every client compare the result with its own best adapter, on its own held-out text, and keep the better one."""
    plan = progress.plan
    done = {line["client"] for line in run.metrics() if (line["stage"], line["name"]) == (plan.stage, "personal/shared")}
    left = {client: share for client, share in plan.clients.items() if client not in done}
    if not left:
        return
    parts, _ = _give_base(decoder, model, plan, engine, run)
    tensors: dict[str, Tensor] = {}
    for name, state in progress.states.items():
        total = state.total().compress()
        tensors |= {f"rest/{name}/b": total.b.float().contiguous(), f"rest/{name}/a": total.a.float().contiguous()}
    messages: dict[str, Message] = {}
    for client, share in left.items():
        info = {**_common(decoder, stage, plan, share, parts, run), "masked": masked, "micro": share.micro}
        messages[client] = (tensors, {**info, "base": run.job.model.path, "title": f"{run.job.name}: {client}'s own adapter"})

    def check(client: str, tensors: dict[str, Tensor], info: Info) -> None:
        check_tensors(tensors, {})
        losses = [info.get("shared"), info.get("own")]
        if losses != [None, None] and not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
            raise WireError("its losses are not finite numbers")

    for client, _, info in ask(engine, run, "personal", messages, stage=plan.stage, round_=stage.rounds, check=check):
        if info["shared"] is None:
            run.say(f"tune: client '{client}' has too little text to hold some out, and keeps no adapter of its own")
            continue
        run.log(plan.stage, None, client, "personal/own", info["own"])
        run.log(plan.stage, None, client, "personal/shared", info["shared"])


def _measure(
    model: Checkpoint, decoder: Decoder, progress: TuningState, round_: int, stage: TuneStage, masked: list[str], run: RunFolder
) -> None:
    """Evaluates the model as it is after a round, where the job asks for it."""
    if stage.eval_every and (round_ + 1) % stage.eval_every == 0:
        folder = run.path / "work" / f"stage-{progress.plan.stage}" / "measured"
        _merge(decoder, progress, masked, folder, run)
        evaluate_round(model.over(folder), progress.plan.stage, round_, run)


def _log(progress: TuningState, stage: int, round_: int, run: RunFolder) -> None:
    """Writes what a round measured, after the round is safe: one that is asked anew is not told of twice."""
    there = {(line["client"], line["name"]) for line in run.metrics() if (line["stage"], line["round"]) == (stage, round_)}
    for client, name, value in progress.metrics:
        if (client, name) not in there:
            run.log(stage, round_, client, name, value)


def pruned_linears(decoder: Decoder) -> list[str]:
    """The linears that have zeros to keep: those of an earlier stage, or of whoever pruned the model before."""
    return [name for name in decoder.linear_names() if float((decoder.read_matrix(name) == 0).double().mean()) > FEW_ZEROS]


def _give_base(decoder: Decoder, model: Checkpoint, plan: TunePlan, engine: Engine, run: RunFolder) -> tuple[int, float]:
    """Sends every client what earlier stages changed, a block at a time: the number of parts, and modelled seconds."""
    changed = model.changed()
    parts = 0
    clock = _clock(plan, {})
    for block in range(len(decoder)):
        weights = decoder.block_names(block).values()
        biases = {name.removesuffix("weight") + "bias" for name in weights}
        names = [name for name in changed if name in weights or name in biases]
        if not names:
            continue
        run.step(f"sending the model: block {block + 1} of {len(decoder)}", block, len(decoder))
        message: Message = ({name: model.read(name) for name in names}, {"stage": plan.stage, "part": parts})
        messages = dict.fromkeys(plan.clients, message)
        list(ask(engine, run, "base", messages, stage=plan.stage, round_=0, check=_nothing, clock=clock))
        parts += 1
    return parts, clock.slowest(clock.spent)


def _plan_anew(
    decoder: Decoder,
    progress: TuningState,
    round_: int,
    stage: TuneStage,
    parts: int,
    masked: list[str],
    engine: Engine,
    run: RunFolder,
) -> None:
    """Asks the clients which linears matter, and gives each a configuration by that."""
    run.step("tune: asking which weights are worth tuning", round_, run.job.tuning(progress.plan.stage).rounds)
    plan = progress.plan
    names = list(decoder.linear_names())
    facts = whole_facts(run, plan)
    messages: dict[str, Message] = {}
    for client, share in plan.clients.items():
        settings = {"steps": stage.importance_steps, "batch": share.micro, "micro": 1, "learning_rate": stage.learning_rate}
        common = _common(decoder, stage, plan, share, parts, run)
        messages[client] = ({}, {**common, "settings": settings, "whole": facts.get(client)})
    scalar = (torch.Size(()), torch.float64)
    expected = {CHANGE + "importance": (torch.Size([len(names)]), torch.float64), WEIGHT + "tokens": scalar}

    def check(client: str, tensors: dict[str, Tensor], info: Info) -> None:
        check_tensors(tensors, expected)
        _check_tokens(client, tensors, plan)

    sizes = measure(decoder, stage.length, bool(masked))
    clock = _clock(plan, importance_seconds(plan.clients, stage, sizes, plan.cards))
    if stage.precision == "fixed":
        shapes = {"importance": torch.Size([len(names)])}
        _, means = sum_whole(engine, run, "importance", messages, plan=plan, round_=round_, shapes=shapes, clock=clock)
        parts_ = means["importance"] / means["importance"].sum()
        importance = {name: float(part) for name, part in zip(names, parts_, strict=True)}
    else:
        sums = WeightedSum()
        answers = ask(engine, run, "importance", messages, stage=plan.stage, round_=round_, check=check, clock=clock)
        for client, tensors, _ in answers:
            sums.add(tensors[CHANGE + "importance"], float(plan.clients[client].tokens))
        importance = scoring.shares(sums.mean(), names)
    if round_ > 0:
        importance = {name: KEPT_SCORE * plan.importance[name] + (1 - KEPT_SCORE) * importance[name] for name in names}
    secure = run.job.privacy.secure_aggregation
    new = make_tune_plan(plan.stage, stage, sizes, plan.cards, importance, round_, together=run.job.together, secure=secure)
    if round_ == 0 or worth(new, stage, importance) > HYSTERESIS * worth(plan, stage, importance):
        progress.plan = new
    else:
        progress.plan = plan.model_copy(update={"importance": importance})
    progress.clock += clock.slowest(clock.spent)
    progress.metrics += [(None, f"importance/{name}", importance[name]) for name in names]
    run.write_json(f"plan-{plan.stage}-tune.json", progress.plan.model_dump(mode="json"))


def _clock(plan: TunePlan, compute: Mapping[str, float]) -> Clock:
    """Of one exchange with the plan's clients, by their cards."""
    cards = {client: plan.cards[client] for client in plan.clients}
    return Clock({client: Pace(compute.get(client, 0.0), card.uplink, card.downlink) for client, card in cards.items()})


def _common(decoder: Decoder, stage: TuneStage, plan: TunePlan, share: TuneAssignment, parts: int, run: RunFolder) -> Info:
    width = decoder.checkpoint.width
    return {
        "stage": plan.stage,
        "parts": parts,
        "width": asdict(width) if width else None,
        "bits": share.bits,
        "length": stage.length,
        "seed": f"{run.job.seed}/{plan.stage}",
        "personal": stage.personal,
    }


def _train_round(
    decoder: Decoder, progress: TuningState, round_: int, stage: TuneStage, parts: int, masked: list[str], engine: Engine, run: RunFolder
) -> None:
    plan = progress.plan
    messages = {
        client: _message(decoder, client, progress, round_, stage, parts, masked, run) for client in sorted(plan.clients)
    }
    clock = _clock(plan, {client: share.compute for client, share in plan.clients.items()})
    if stage.precision == "fixed":
        heard = _add_whole(decoder, progress, round_, stage, messages, clock, engine, run)
        _count_round(progress, stage, heard, clock)
        return
    check = _checker(decoder, stage, plan)
    answers = ask(engine, run, "train", messages, stage=plan.stage, round_=round_, check=check, clock=clock)
    losses = WeightedSum()
    heard = []

    def each() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for client, tensors, info in answers:
            heard.append(client)
            if stage.epsilon is None:
                losses.add(torch.tensor(info["loss"], dtype=torch.float64), float(plan.clients[client].tokens))
                progress.metrics.append((client, "loss", info["loss"]))
            progress.metrics.append((client, "seconds", clock.spent[client]))
            yield client, tensors

    if plan.rank:
        _fold_adapters(decoder, progress, stage, each(), run)
    else:
        _fold_dense(decoder, progress, each())
    if stage.epsilon is None:
        progress.metrics.append((None, "loss", float(losses.mean())))
    _count_round(progress, stage, heard, clock)


def _count_round(progress: TuningState, stage: TuneStage, heard: list[str], clock: Clock) -> None:
    plan = progress.plan
    for client in heard:
        progress.seen[client] = progress.seen.get(client, 0) + stage.steps * plan.clients[client].batch
    progress.clock += clock.slowest(heard)
    progress.metrics.append((None, "clock", progress.clock))


def _add_whole(
    decoder: Decoder,
    progress: TuningState,
    round_: int,
    stage: TuneStage,
    messages: dict[str, Message],
    clock: Clock,
    engine: Engine,
    run: RunFolder,
) -> list[str]:
    """A round in whole numbers: what all changed together, on top of where all began; returns who is in the sum."""
    plan = progress.plan
    widest = plan.widest()
    shapes = {f"{name}/b": torch.Size([decoder.read_shape(name)[0], rank]) for name, rank in widest.items()}
    if stage.epsilon is None:
        shapes[whole.LOSS] = torch.Size([1])
    heard, changes = sum_whole(engine, run, "train", messages, plan=plan, round_=round_, shapes=shapes, clock=clock)
    seed = f"{run.job.seed}/{plan.stage}"
    for name, rank in widest.items():
        num_out, num_in = decoder.read_shape(name)
        old = progress.states.get(name, State(Factors.none(num_out, num_in), Factors.none(num_out, num_in)))
        own = fill(old.live.part(0, rank), rank, name, seed)
        began = own.b.to(getattr(torch, stage.dtype)).double()  # as the clients were given it
        live = Factors(began + changes[f"{name}/b"], own.a.double())
        progress.states[name] = State(live.plus(old.live.part(rank, old.live.rank)), old.frozen)
    progress.metrics += [(client, "seconds", clock.spent[client]) for client in heard]
    if whole.LOSS in changes:
        progress.metrics.append((None, "loss", float(changes[whole.LOSS])))
    return heard


def _message(
    decoder: Decoder,
    client: str,
    progress: TuningState,
    round_: int,
    stage: TuneStage,
    parts: int,
    masked: list[str],
    run: RunFolder,
) -> Message:
    """What one client is asked to do in a round: see :func:`fedgrove.client.handlers.train`."""
    plan = progress.plan
    share = plan.clients[client]
    dtype = getattr(torch, stage.dtype)
    falling = 1 - 0.9 * round_ / max(1, stage.rounds - 1) if stage.lr_schedule == "linear" else 1.0
    info = {
        **_common(decoder, stage, plan, share, parts, run),
        "ranks": share.ranks if plan.rank else None,
        "scales": {name: scale(stage, rank) for name, rank in share.ranks.items()},
        "masked": masked,
        "round": round_,
        "seen": progress.seen.get(client, 0),
        "trains": _rule(stage).TRAINS,
        "whole": whole_facts(run, plan).get(client),
        "private": private_facts(run, plan, client),
        "release": f"{run.name}/{plan.stage}/{round_}" if stage.epsilon is not None else None,
        "precision": stage.dtype,
        "settings": {
            "steps": stage.steps,
            "batch": share.batch,
            "micro": share.micro,
            "learning_rate": stage.learning_rate * falling,
            "optimizer": stage.optimizer,
            "max_grad_norm": stage.max_grad_norm,
            "proximal": stage.proximal,
        },
    }
    if not plan.rank:
        return {f"own/{name}": change.to(dtype) for name, change in progress.dense.items()}, info
    tensors: dict[str, Tensor] = {}
    for name, state in progress.states.items():
        start = _rule(stage).begin(state, share.ranks.get(name, 0))
        for kind, factors in (("own", start.own), ("rest", start.rest)):
            if factors.rank:
                tensors[f"{kind}/{name}/b"] = factors.b.to(dtype).contiguous()
                if _rule(stage).TRAINS == "ab":
                    tensors[f"{kind}/{name}/a"] = factors.a.to(dtype).contiguous()
    return tensors, info


def scale(stage: TuneStage, rank: int) -> float:
    """α/r, or rank-stabilised where the job gives no α: 2 at the largest rank, and ∝ 1/√r (rsLoRA, arXiv 2312.03732).

    So a step of the optimizer moves the weight about as far at any rank, and a client of low rank learns as fast.
    """
    return 2.0 * math.sqrt(stage.ranks[-1] / rank) if stage.alpha is None else stage.alpha / rank


def _fold_adapters(
    decoder: Decoder, progress: TuningState, stage: TuneStage, answers: Iterator[tuple[str, dict[str, Tensor]]], run: RunFolder
) -> None:
    plan, aggregation = progress.plan, _rule(stage)
    shapes = {name: decoder.read_shape(name) for name in plan.tuned()}
    old = {name: progress.states.get(name, State(Factors.none(*shape), Factors.none(*shape))) for name, shape in shapes.items()}
    ranks = {name: [share.ranks[name] for share in plan.clients.values() if name in share.ranks] for name in shapes}
    sums = {name: aggregation.sums(old[name], ranks[name]) for name in shapes}
    seed = f"{run.job.seed}/{plan.stage}"
    for client, tensors in answers:
        share = plan.clients[client]
        for name, rank in share.ranks.items():
            a = tensors.get(f"{CHANGE}{name}/a")
            if a is None:
                a = fill(aggregation.begin(old[name], rank).own, rank, name, seed).a
            aggregation.add(sums[name], Factors(tensors[f"{CHANGE}{name}/b"], a), float(share.tokens))
    for name in shapes:
        rank = max(ranks[name])
        new = aggregation.finish(old[name], sums[name], Options(max(rank, old[name].live.rank), stage.partition))
        memory = progress.memories.get(name, ServerOptimizerState(Factors.none(*shapes[name])))
        live, memory = step(stage.server_optimizer, old[name].live, new.live, memory, stage.server_lr, max(rank, old[name].live.rank))
        progress.states[name] = State(live, new.frozen)
        if stage.server_optimizer != "average":
            progress.memories[name] = memory


def _fold_dense(decoder: Decoder, progress: TuningState, answers: Iterator[tuple[str, dict[str, Tensor]]]) -> None:
    sums = {name: WeightedSum() for name in decoder.linear_names()}
    for client, tensors in answers:
        for name, total in sums.items():
            total.add(tensors[CHANGE + name], float(progress.plan.clients[client].tokens))
    for name, total in sums.items():
        change = total.mean()
        progress.dense[name] = (progress.dense[name] + change if name in progress.dense else change).float()


def _checker(decoder: Decoder, stage: TuneStage, plan: TunePlan) -> Callable[[str, dict[str, Tensor], Info], None]:
    """What an answer must look like: names, shapes, dtypes, finite values, and the number of tokens that the card said."""
    dtype = getattr(torch, stage.dtype)

    def check(client: str, tensors: dict[str, Tensor], info: Info) -> None:
        expected: dict[str, tuple[torch.Size, torch.dtype]] = {WEIGHT + "tokens": (torch.Size(()), torch.float64)}
        if plan.rank:
            for name, rank in plan.clients[client].ranks.items():
                num_out, num_in = decoder.read_shape(name)
                expected[f"{CHANGE}{name}/b"] = (torch.Size([num_out, rank]), dtype)
                if "a" in _rule(stage).TRAINS:
                    expected[f"{CHANGE}{name}/a"] = (torch.Size([rank, num_in]), dtype)
        else:
            expected.update({CHANGE + name: (torch.Size(decoder.read_shape(name)), dtype) for name in decoder.linear_names()})
        check_tensors(tensors, expected)
        _check_tokens(client, tensors, plan)
        loss = info.get("loss")
        if stage.epsilon is not None:
            return
        if not isinstance(loss, float) or not math.isfinite(loss):
            raise WireError("its loss is not a finite number")

    return check


def _check_tokens(client: str, tensors: dict[str, Tensor], plan: TunePlan) -> None:
    claimed = float(tensors[WEIGHT + "tokens"])
    if claimed != plan.clients[client].tokens:
        raise WireError(f"it claims {claimed:g} tokens, but its card said {plan.clients[client].tokens}")


def _nothing(client: str, tensors: dict[str, Tensor], info: Info) -> None:
    check_tensors(tensors, {})


def _merge(decoder: Decoder, progress: TuningState, masked: list[str], folder: Path, run: RunFolder) -> None:
    """Writes the linears with their changes, block by block, in the checkpoint's dtype."""
    for block in range(len(decoder)):
        merged = {}
        for linear, stored in decoder.block_names(block).items():
            name = f"{decoder.prefix}.{block}.{linear}"
            change = progress.dense.get(name)
            if name in progress.states:
                change = progress.states[name].total().product()
            if change is not None:
                weight = merge(decoder.read_matrix(name), change, name in masked)
                merged[stored] = as_matrix(decoder.model.get_submodule(name), weight).contiguous()
        if merged:
            save_tensors(merged, folder / f"block-{block:04d}.safetensors")


def _rule(stage: TuneStage) -> ModuleType:
    return plugins.load("stages.tune.aggregation", stage.aggregation)


def _file(run: RunFolder, stage: int, round_: int) -> Path:
    return run.path / "work" / f"stage-{stage}" / f"adapters-{round_:04d}.safetensors"


def _write(file: Path, progress: TuningState) -> None:
    tensors: dict[str, Tensor] = {f"dense/{name}": change for name, change in progress.dense.items()}

    def put(kind: str, name: str, factors: Factors) -> None:
        tensors[f"{kind}/b/{name}"], tensors[f"{kind}/a/{name}"] = factors.b, factors.a

    for name, state in progress.states.items():
        put("live", name, state.live)
        put("frozen", name, state.frozen)
    for name, memory in progress.memories.items():
        put("first", name, memory.first)
    facts = {
        "plan": progress.plan.model_dump(mode="json"),
        "seen": progress.seen,
        "clock": progress.clock,
        "metrics": progress.metrics,
        "second": {name: memory.second for name, memory in progress.memories.items()},
    }
    save_tensors(tensors, file, {"progress": json.dumps(facts)})


def _read(file: Path, plan: TunePlan) -> TuningState:
    with safe_open(file, framework="pt") as opened:
        facts: dict[str, Any] = json.loads(opened.metadata()["progress"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    progress = TuningState(TunePlan(**facts["plan"]), seen=facts["seen"], clock=facts["clock"])
    progress.metrics = [(client, name, value) for client, name, value in facts["metrics"]]

    def get(kind: str, name: str) -> Factors:
        return Factors(tensors[f"{kind}/b/{name}"], tensors[f"{kind}/a/{name}"])

    for key in tensors:
        kind, _, name = key.partition("/")
        if kind == "dense":
            progress.dense[name] = tensors[key]
        elif key.startswith("live/b/"):
            name = key.removeprefix("live/b/")
            progress.states[name] = State(get("live", name), get("frozen", name))
        elif key.startswith("first/b/"):
            name = key.removeprefix("first/b/")
            progress.memories[name] = ServerOptimizerState(get("first", name), facts["second"][name])
    return progress
