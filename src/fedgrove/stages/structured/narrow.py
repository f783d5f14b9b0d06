"""Cuts channels and heads out of blocks, block by block; with ``repair``, by sums over the inputs of their consumers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open

from fedgrove.client.hidden_states import Tokens
from fedgrove.errors import FedgroveError
from fedgrove.events import Phase
from fedgrove.input_statistics import fixed_point
from fedgrove.input_statistics.exchange import SCALE, InputSums, largest_per_client
from fedgrove.input_statistics.probe import SharedInput, probe
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.federation import Federation
from fedgrove.rounds.request import CHANGE, Message, Reply, Tensors
from fedgrove.runfolder import RunFolder
from fedgrove.stages.structured.choice import BLOCKS, GROUPS, Choice, calibration_of, choose, metadata, sums_file
from fedgrove.stages.structured.config import Config
from fedgrove.stages.structured.cut import ConsumerInputs, cut_block, cut_parts, has_bias
from fedgrove.stages.structured.exchanges.inputs import HALVES, SumInputs
from fedgrove.stages.structured.plan import Plan


def cut_blocks(model: Checkpoint, plan: Plan, config: Config, choice: Choice, overlay: Path, federation: Federation) -> None:
    """Cuts every block that is not cut yet, and repairs it.

    With ``evaluate.alone`` and ``repair``, each client's own sums repair the blocks that it would have cut by itself, as they
    arrive: the server never has the sums of more than one client and of all together.

    Args:
        model: the model at the start of the stage.
        overlay: the folder of the blocks that were cut.
    """
    run, job = federation.run, federation.job
    decoder = Decoder(model, federation.device)
    if not config.repair:
        for block in choice.blocks:
            _progress(run, plan, block)
            _save(decoder, block, choice, None, overlay, [])
        return
    alone = {client: choose(run, plan, config, client) for client in _scored(run, plan)} if job.evaluate.alone else {}
    inputs: list[dict[str, SharedInput]] = []

    def save(block: int, one: Choice, folder: Path, sums: Tensors, tokens: int, clients: list[str]) -> None:
        if block in one.blocks:
            _save(decoder, block, one, _known(decoder, block, plan, inputs[block], sums, tokens), folder, clients)

    def save_alone(block: int, client: str, sums: Tensors, tokens: int) -> None:
        if client in alone:
            save(block, alone[client], alone_overlay(run, plan, client), sums, tokens, [client])

    for block in range(plan.num_blocks) if alone else choice.blocks:
        folders = [overlay, *(alone_overlay(run, plan, client) for client in alone)]
        wanted = [folder for folder, one in zip(folders, [choice, *alone.values()], strict=True) if block in one.blocks]
        if all(_file(folder, block).is_file() for folder in wanted):
            continue
        _progress(run, plan, block)
        inputs = inputs or probe(decoder, config.length, job.seed)
        sums = _collect(decoder, block, plan, config, inputs[block], federation, partial(save_alone, block))
        save(block, choice, overlay, sums.sums, sums.tokens, sums.clients)


def cut_alone(model: Checkpoint, plan: Plan, config: Config, choice: Choice, client: str, run: RunFolder) -> None:
    """Cuts the blocks of the model that a client would have alone; if they are repaired, :func:`cut_blocks` did.

    Raises:
        FedgroveError: the client sent no sums for the repair of a block.
    """
    overlay, decoder = alone_overlay(run, plan, client), Decoder(model)
    for block in choice.blocks:
        if config.repair and not _file(overlay, block).is_file():
            raise FedgroveError("it sent no sums, so its model alone cannot be measured (evaluate.alone)", client=client)
        _save(decoder, block, choice, None, overlay, [client])


def alone_overlay(run: RunFolder, plan: Plan, client: str) -> Path:
    """The folder of the blocks that a client would have cut alone."""
    return run.path / "work" / f"stage-{plan.stage}" / "alone" / client


def read_record(plan: Plan, choice: Choice, block: int, overlay: Path) -> dict[str, Any]:
    """What was done to a block: the groups that are cut, by kind, and how the repair of each kind went."""
    assert choice.groups is not None
    assert plan.before is not None
    record: dict[str, Any] = {"block": block}
    for kind, kept in choice.groups[block].items():
        before = getattr(plan.before, kind)
        if len(kept) < before:
            record[kind] = sorted(set(range(before)) - set(kept.tolist()))
    with safe_open(_file(overlay, block), framework="pt") as file:
        record |= json.loads(file.metadata()["record"])
    return record


def _save(
    decoder: Decoder,
    block: int,
    choice: Choice,
    inputs: Mapping[str, ConsumerInputs] | None,
    overlay: Path,
    clients: list[str],
) -> None:
    """Writes a block that is cut, unless it is there already; the names of its tensors are those of the shorter model.

    Weights that it shares with earlier blocks are in the file of the first of these.
    """
    if _file(overlay, block).is_file():
        return
    assert choice.groups is not None
    tensors, repairs = cut_block(decoder, block, choice.groups[block], inputs)
    result = decoder.checkpoint
    if len(choice.blocks) < len(decoder):
        result = result.over(kept_blocks=choice.blocks)
    earlier = {stored for other in choice.blocks if other < block for stored in decoder.block_names(other).values()}
    own = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] + ".weight" not in earlier}
    new = {cast(str, result.new_name(name)): tensor for name, tensor in own.items()}
    record = {"repair": repairs, "clients": clients} if inputs is not None else {}
    save_tensors(new, _file(overlay, block), {"record": json.dumps(record)})


def _known(
    decoder: Decoder, block: int, plan: Plan, inputs: Mapping[str, SharedInput], sums: Tensors, tokens: int
) -> dict[str, ConsumerInputs]:
    """The sums over the inputs of a block's consumers as floats, by kind of group."""
    assert plan.after is not None
    known = {}
    for kind, part in cut_parts(decoder.checkpoint.config, plan.after).items():
        first = _input_of(part.consumer, inputs)
        scale = inputs[first].scale.to(decoder.device)
        halves, means = [], None
        for half in HALVES:
            prefix = f"{first}/{half}/"
            at = {name.removeprefix(prefix): sum_.to(decoder.device) for name, sum_ in sums.items() if name.startswith(prefix)}
            halves.append(fixed_point.finish(at["squares"], at["products"], scale, tokens).gram)
            if "sums" in at:
                mean = fixed_point.finish(at["squares"], None, scale, tokens, (at["sums"], at["spreads"])).means
                means = mean if means is None else means + mean
        known[kind] = ConsumerInputs((halves[0], halves[1]), means if has_bias(decoder, block, part.consumer) else None)
    return known


class _RepairSums(InputSums):
    """The sums over all clients; each client's own are shown to a function before they are added."""

    def __init__(self, messages: Mapping[str, Message], each: Callable[[str, Tensors, int], None]):
        super().__init__(messages)
        self._each = each

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        assert isinstance(reply, Tokens)
        self._each(client, {name.removeprefix(CHANGE): value for name, value in tensors.items()}, reply.tokens)
        super().add(client, tensors, reply)


def _collect(
    decoder: Decoder,
    block: int,
    plan: Plan,
    config: Config,
    inputs: Mapping[str, SharedInput],
    federation: Federation,
    each: Callable[[str, Tensors, int], None],
) -> InputSums:
    """Requests the sums over the inputs of a block's consumers from the clients, and adds them up."""
    messages = {client: input_message(decoder, block, plan, config, client, inputs, federation) for client in plan.clients}
    sums = _RepairSums(messages, each)
    federation.aggregator.aggregate(messages, sums)
    return sums


def input_message(
    decoder: Decoder,
    block: int,
    plan: Plan,
    config: Config,
    client: str,
    inputs: Mapping[str, SharedInput],
    federation: Federation,
) -> Message:
    """The request to one client for the sums over the inputs of a block's consumers."""
    assert plan.after is not None
    consumers = [part.consumer for part in cut_parts(decoder.checkpoint.config, plan.after).values()]
    summed = [_input_of(consumer, inputs) for consumer in consumers]
    request = SumInputs(
        stage=plan.stage,
        block=block,
        calibration=calibration_of(plan, config, client, federation.job, "dense"),
        consumers={name: first for first, one in inputs.items() for name in one.consumers},
        widths={first: inputs[first].scale.numel() for first in summed},
        products=tuple(sorted(summed)),
        moments=any(has_bias(decoder, block, consumer) for consumer in consumers),
        limit=largest_per_client(len(plan.clients)),
    )
    return Message(request, {SCALE + first: inputs[first].scale for first in summed})


def _input_of(consumer: str, inputs: Mapping[str, SharedInput]) -> str:
    """The name of the input that a linear reads."""
    return next(first for first, one in inputs.items() if consumer in one.consumers)


def _scored(run: RunFolder, plan: Plan) -> list[str]:
    """The clients in the sums of all scores."""
    files = [sums_file(run, plan, what) for what in (BLOCKS, GROUPS)]
    return sorted(set.intersection(*(set(metadata(file)["clients"]) for file in files if file.is_file())))


def _progress(run: RunFolder, plan: Plan, block: int) -> None:
    run.phase(Phase("structured", stage=plan.stage, block=block, blocks=plan.num_blocks))


def _file(overlay: Path, block: int) -> Path:
    """Where a block that is cut is stored; blocks are numbered as at the start of the stage."""
    return overlay / f"block-{block:04d}.safetensors"
