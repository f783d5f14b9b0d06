"""Pruning by summed statistics: the clients send sums over their text, the server prunes (aggregation ``pooled``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove import plugins
from fedgrove.stages.prune import pruners
from fedgrove.client.handlers import SCALE, START
from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.stages.prune.input_statistics import InputStatistics
from fedgrove.job import PruneStage
from fedgrove.stages.prune.masks import Target
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.stages.prune.calibration_pass import watching
from fedgrove.models.experts import expert_of
from fedgrove.stages.prune.plan import Plan, calibration
from fedgrove.privacy import noise
from fedgrove.privacy.secure import smallest_sum, sum_securely
from fedgrove.stages.prune.pruners import magnitude
from fedgrove.rounds.collect import Message, ask
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.wire import CHANGE, Info, WireError
from fedgrove.rounds.wire import check as check_tensors
from fedgrove.stages.prune.aggregation import pooled as statistics
from fedgrove.runfolder import Run

PROBE = 512  # random tokens at most that the model is run over to see how large its inputs are


@dataclass(frozen=True)
class Pruned:
    """What was made of a linear: weight and mask (out, in), who contributed, and how far clients' masks agreed."""

    weight: Tensor
    mask: Tensor
    clients: list[str]
    agreement: float | None = None


@dataclass(frozen=True)
class Inlet:
    """An input that one or several linears of a block read.

    Attributes:
        readers: the linears; the first gives the input its name.
        scale: (in,) what clients multiply by, see :func:`fedgrove.stages.prune.aggregation.pooled.scale_of`.
        products: whether Σ xᵢxⱼ is asked for, besides Σ x².
        norm: what a window's Σ x² is clipped to where it is to be differentially private.
    """

    readers: list[str]
    scale: Tensor
    products: bool
    norm: float


def probe(decoder: Decoder, stage: PruneStage, seed: int) -> list[dict[str, Inlet]]:
    """The inputs of every block and how large they are: one pass over random tokens, nobody's text.

    Returns:
        For each block its inputs by name.
    """
    vocabulary = decoder.checkpoint.config.get_text_config().vocab_size
    length = min(stage.length, PROBE)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (1, length), generator=generator)
    hidden, calls = decoder.embed(ids)
    width = hidden.shape[-1]
    blocks = []
    for index in range(len(decoder)):
        with decoder.loaded(index) as block, watching(block, lambda name: InputStatistics("squares")) as inputs:
            hidden = decoder.run(block, hidden, calls[index])
        readers: dict[int, list[str]] = {}
        for name, shared in inputs.items():
            readers.setdefault(id(shared), []).append(name)
        inlets = {}
        for names in readers.values():
            seen = _seen(names[0], inputs)
            scale = statistics.scale_of(seen).cpu()
            norm = noise.NORM * stage.length / length * float((seen.squares.cpu() * scale.square()).norm())
            inlets[names[0]] = Inlet(names, scale, _wants_products(stage, len(scale), width), norm)
        blocks.append(inlets)
    return blocks


def _seen(first: str, inputs: Mapping[str, InputStatistics]) -> InputStatistics:
    """What random tokens showed of an input; where none reached an expert, what they showed of another's like it."""
    if inputs[first].silent and expert_of(first):
        leaf = first.rpartition(".")[2]
        alike = (sums for name, sums in inputs.items() if expert_of(name) and name.rpartition(".")[2] == leaf)
        return next((sums for sums in alike if not sums.silent), inputs[first])
    return inputs[first]


def _wants_products(stage: PruneStage, num_in: int, width: int) -> bool:
    return plugins.load("stages.prune.pruners", stage.pruner).NEEDS == "gram" and not (stage.mixed and num_in > width)


def wants_moments(stage: PruneStage) -> bool:
    """Whether the pruner needs means and variances."""
    return bool(plugins.load("stages.prune.pruners", stage.pruner).NEEDS == "moments")


def without_data(decoder: Decoder, block: int, target: Target) -> dict[str, Pruned]:
    """Prunes a block by magnitude: nobody is asked anything."""
    made = {}
    for name in decoder.block_names(block):
        before = decoder.read_linear(block, name)
        weight, mask = magnitude.prune(before.float().contiguous().clone(), InputStatistics("nothing"), target)
        made[name] = Pruned(weight.to(before.dtype), mask, [])
    return made


def pooled_squares(block: int, blocks: list[dict[str, Inlet]], plan: Plan, engine: Engine, run: Run) -> dict[str, InputStatistics]:
    """The clients' sums of squares of a block's inputs in the model as the stage began, by linear.

    Args:
        blocks: the inputs of every block, from :func:`probe`.
    """
    inlets = {first: replace(inlet, products=False) for first, inlet in blocks[block].items()}
    tensors = {SCALE + name: inlet.scale for name, inlet in inlets.items()}
    messages: dict[str, Message] = {
        client: (tensors, {**statistics_info(run, plan, client, block, inlets, 0), "source": "dense"})
        for client in plan.contributors(0, block)
    }
    found = _collect(engine, run, plan, block, messages, inlets)
    return {name: _inputs(run, plan, first, inlet, found) for first, inlet in inlets.items() for name in inlet.readers}


def from_statistics(
    decoder: Decoder,
    block: int,
    blocks: list[dict[str, Inlet]],
    target: Target,
    plan: Plan,
    engine: Engine,
    run: Run,
    previous: Path,
) -> dict[str, Pruned]:
    """The clients sum, the server prunes with what the sums say.

    Args:
        decoder: the model as the stage began.
        blocks: the inputs of every block, from :func:`probe`.
        target: of this block.
        previous: the file of the block before this one, pruned; ``sequential`` clients walk on through it.
    """
    stage = run.job.pruning(plan.stage)
    inlets = blocks[block]
    num_inputs = sum(map(len, blocks[1:] if stage.protect_first_block else blocks))
    contributors = plan.contributors(0, block)
    tensors: dict[str, Tensor] = {SCALE + name: inlet.scale for name, inlet in inlets.items()}
    if stage.walk == "sequential" and block > 0:
        stored = load_file(previous)
        for name, key in decoder.block_names(block - 1).items():
            tensors[START + name] = as_matrix(decoder.blocks[block - 1].get_submodule(name), stored[key]).contiguous()
    messages: dict[str, Message] = {
        client: (tensors, statistics_info(run, plan, client, block, inlets, num_inputs)) for client in contributors
    }
    found = _collect(engine, run, plan, block, messages, inlets)
    made = {}
    for first, inlet in inlets.items():
        inputs = _inputs(run, plan, first, inlet, found)
        pruner = stage.pruner if inputs.needs != "squares" else "wanda"
        for name in inlet.readers:
            before = decoder.read_linear(block, name)
            weight = before.to(decoder.device, torch.float32, copy=True).contiguous()
            weight, mask = pruners.prune(pruner, weight, inputs, target, stage.damps)
            made[name] = Pruned(weight.to(before.dtype).cpu(), mask.cpu(), found[0])
    return {name: made[name] for name in decoder.block_names(block)}


Found = tuple[list[str], int, dict[str, Tensor]]  # who is in a sum, of how many tokens, and the sum


def _inputs(run: Run, plan: Plan, first: str, inlet: Inlet, found: Found) -> InputStatistics:
    """What was summed of one input, as a pruner reads it."""
    _, tokens, sums = found
    squares, upper = sums[f"{CHANGE}{first}/squares"], sums.get(f"{CHANGE}{first}/products")
    moments = None
    if wants_moments(run.job.pruning(plan.stage)):
        moments = sums[f"{CHANGE}{first}/sums"], sums[f"{CHANGE}{first}/spreads"]
    return statistics.finish(squares, upper, inlet.scale, tokens, moments)


def _collect(
    engine: Engine, run: Run, plan: Plan, block: int, messages: Mapping[str, Message], inlets: Mapping[str, Inlet]
) -> Found:
    """Asks for the sums of a block: the server sees each answer, or with secure aggregation none."""
    scales = {name: inlet.scale for name, inlet in inlets.items()}
    products = {name: inlet.products for name, inlet in inlets.items()}
    stage, secure = run.job.pruning(plan.stage), run.job.privacy.secure_aggregation
    largest, bits = _largest(run, plan)
    moments = stage.length if wants_moments(stage) else 0

    def check(client: str, answer: dict[str, Tensor], info: Info) -> None:
        samples = plan.clients[client].samples
        if [info.get(key) for key in ("stage", "block")] != [plan.stage, block]:
            raise WireError("it answers another ask")
        if info.get("tokens") != samples * stage.length:
            raise WireError(f"it claims {info.get('tokens')!r} tokens, not {samples * stage.length}")
        if secure:  # no value can be told from random
            check_tensors(answer, statistics.expected(scales, products, moments > 0))
        else:
            statistics.check_sums(answer, scales, products, samples, largest // len(messages), moments=moments)

    if secure:
        infos, sums = sum_securely(engine, run, "pooled", messages, stage=plan.stage, round_=0, check=check, bits=bits)
        windows = sum(plan.clients[client].samples for client in infos)
        try:
            statistics.check_sums(sums, scales, products, windows, largest, noisy=stage.epsilon is not None, moments=moments)
        except WireError as fault:
            raise FedgroveError(
                f"the clients' sum: {fault}; one of them sent no statistics, and secure aggregation hides which. "
                "Leave clients out until it holds"
            ) from fault
        return sorted(infos), sum(info["tokens"] for info in infos.values()), sums

    totals = {name: WeightedSum() for name in statistics.expected(scales, products, moments > 0)}
    clients, tokens = [], 0
    for client, answer, info in ask(engine, run, "pooled", messages, stage=plan.stage, round_=0, check=check):
        clients.append(client)
        tokens += info["tokens"]
        for name, total in totals.items():
            total.add(answer[name], 1.0)
    return clients, tokens, {name: total.value for name, total in totals.items() if total.value is not None}


def _largest(run: Run, plan: Plan) -> tuple[int, int]:
    """The largest sum that is allowed, and the bits of the ring that it is taken in."""
    if not run.job.privacy.secure_aggregation:
        return statistics.LARGEST, 64
    tokens = sum(share.samples for share in plan.clients.values()) * run.job.pruning(plan.stage).length
    bits = statistics.ring_bits(tokens)
    return 2 ** (bits - 2), bits


def statistics_info(run: Run, plan: Plan, client: str, block: int, inlets: Mapping[str, Inlet], num_inputs: int) -> Info:
    """The JSON of an ask of kind ``pooled``: see :func:`fedgrove.client.handlers.statistics`."""
    stage = run.job.pruning(plan.stage)
    noisy = None
    if stage.epsilon is not None:
        noisy = {
            "norms": {first: inlet.norm for first, inlet in inlets.items()},
            "inputs": num_inputs,
            "clients": smallest_sum(len(plan.clients)),
            "epsilon": stage.epsilon,
            "delta": stage.delta,
        }
    return {
        "noise": noisy,
        "release": f"{run.name}/{plan.stage}/{block}" if noisy else None,
        "run": run.name,
        "stage": plan.stage,
        "block": block,
        "source": stage.walk,
        "compute": stage.compute_dtype,
        "readers": {name: first for first, inlet in inlets.items() for name in inlet.readers},
        "products": [first for first, inlet in inlets.items() if inlet.products],
        "moments": wants_moments(stage),
        "limit": _largest(run, plan)[0] // len(plan.contributors(0, block)),
        **calibration(run.job.seed, plan.stage, plan.clients[client].samples, stage.length),
    }
