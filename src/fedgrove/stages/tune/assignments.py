"""Each client's part of a plan, from the configuration that was chosen for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from fedgrove.models.cost import ModelCost
from fedgrove.rounds import wire
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.rounds.request import CHANGE
from fedgrove.stages import base
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.holding import choosing_bytes
from fedgrove.stages.tune.parametrizations import Parametrization, trainable_of
from fedgrove.stages.tune.trainers import demanding_of, trainer_of


class Assignment(base.Assignment):
    """One client's part in each round.

    Attributes:
        bits: of each frozen weight.
        batch: windows of an optimizer step.
        micro: windows computed at once on each device (the micro-batch).
        ranks: by linear, for those that the client trains; 1 for parametrizations without ranks.
        tokens: of the client's text: its weight in the sum.
        download: bytes in a round; ``upload`` is also of one round.
        compute: seconds of computation in a round; ``seconds`` also contains download and upload.
        steps: optimizer steps of a round.
        devices: number of devices that share the windows of a step.
        forwards: forward passes of one window in a round, if there is no backward pass; else 0.
        trainer: its name: the job's, or its fallback.
        experts: of every block that has any, how many experts the client holds; None: the model has none.
    """

    bits: int
    batch: int
    micro: int
    ranks: dict[str, int]
    tokens: int
    download: int
    compute: float
    steps: int
    devices: int = 1
    forwards: int = 0
    trainer: str
    experts: int | None = None


def assignments_of(
    config: Config,
    method: Parametrization,
    whole: ModelCost,
    costs: Mapping[str, ModelCost],
    space: SearchSpace,
    budgets: Mapping[str, Budget],
    capabilities: Mapping[str, Capabilities],
    configs: Mapping[str, ClientConfig],
    kept: Mapping[str, int],
) -> dict[str, Assignment]:
    """The assignments: each client's configuration and its cost.

    Args:
        whole: cost of the model; costs: by client, of the model as it holds it.
        kept: by linear, the largest rank of any client, which determines the download.
    """
    assignments = {}
    for name, chosen in configs.items():
        client, cost = capabilities[name], costs[name]
        walks = bool(config.personal_experts)  # to choose, text passes through the whole model, block by block
        held = replace(chosen, ranks={linear: rank for linear, rank in chosen.ranks.items() if linear in cost.linears})
        received = {linear: rank for linear, rank in kept.items() if rank and linear in cost.linears}
        down = space.number * method.numbers(cost, received, config, sent=False)
        up = space.number * method.numbers(cost, held.ranks, config, sent=True)
        if config.precision == "fixed":
            up = 4 * method.numbers(whole, kept, config, sent=True)
        if method.FORM == "tensors":  # factors are large beside their framing, and a planner's deadline does not count it
            up += _framing(config, whole, kept if config.precision == "fixed" else held.ranks)
            down += _framing(config, cost, received)
        trainer, memory, compute = _trained(config, method, cost, space, budgets[name], held)
        sending = (8 * up / client.uplink if client.uplink else 0.0) + (8 * down / client.downlink if client.downlink else 0.0)
        assignments[name] = Assignment(
            bits=chosen.bits,
            batch=chosen.batch,
            micro=chosen.micro,
            ranks={linear: chosen.ranks[linear] for linear in whole.linears if linear in chosen.ranks},
            tokens=client.tokens.get(config.length, 0),
            memory=max(math.ceil(memory), choosing_bytes(whole) if walks or cost is not whole else 0),
            upload=math.ceil(up),
            download=math.ceil(down),
            compute=round(compute, 6),
            seconds=round(compute + sending, 3),
            steps=chosen.steps or config.steps,
            devices=client.devices,
            forwards=2 * config.steps * chosen.batch if trainer_of(trainer).WITHOUT_GRADIENTS else 0,
            trainer=trainer,
        )
    return assignments


def _trained(
    config: Config, method: Parametrization, cost: ModelCost, space: SearchSpace, budget: Budget, chosen: ClientConfig
) -> tuple[str, float, float]:
    """A client's trainer, the bytes at its peak, and the seconds of a round's computation."""
    memory, compute = method.memory(cost, space, chosen), method.compute_seconds(cost, space, budget, chosen)
    fallback = config.trainer_method.FALLBACK
    if fallback is None:
        return config.trainer, memory, compute
    demanding = demanding_of(config.trainer)
    if demanding.memory(cost) > budget.memory:
        return fallback, memory, compute
    exact = demanding.compute_seconds(cost, config.steps * chosen.batch, budget.speed)
    return config.trainer, max(memory, demanding.memory(cost)), exact


def _framing(config: Config, cost: ModelCost, ranks: Mapping[str, int]) -> int:
    """Bytes of a message besides its numbers; much where tensors are as small as those of (IA)³."""
    shared_a, method, dtype = config.aggregation_method.SHARED_A, trainable_of(config.parametrization), config.dtype
    return wire.framing({
        f"{CHANGE}{name}/{part}": spec
        for name, rank in ranks.items() if rank
        for part, spec in method.expected(cost.linears[name], rank, getattr(torch, dtype), shared_a).items()
    })  # fmt: skip
