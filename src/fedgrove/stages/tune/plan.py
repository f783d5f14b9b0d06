"""Who tunes what: a configuration for each client, by what it has. Plain data, the same whenever it is made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch

from fedgrove.errors import FedgroveError
from fedgrove.models.cost import ModelCost
from fedgrove.privacy.accounting import dp_sgd_noise_multiplier, gaussian_noise_multiplier
from fedgrove.privacy.release import client_statement, window_statement
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.rounds import wire
from fedgrove.rounds.capabilities import SPEED, Capabilities
from fedgrove.rounds.request import Disclosure
from fedgrove.stages import base
from fedgrove.stages.tune import cost as costs
from fedgrove.stages.tune import fixed_point
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.exchanges.importance import ScoreLinears
from fedgrove.stages.tune.exchanges.personal import ComparePersonal
from fedgrove.stages.tune.importance import RANK
from fedgrove.stages.tune.parametrizations import Parametrization, parametrization_of
from fedgrove.stages.tune.planners import Problem, planner_of


class Assignment(base.Assignment):
    """One client's part in each round.

    Attributes:
        bits: of each frozen weight.
        batch: windows of an optimizer step; micro: windows computed at once, on each device.
        ranks: by linear, of those that it trains; 1 for parametrizations without ranks.
        tokens: of its text: its weight in the sum.
        download: bytes; upload, likewise, of a round.
        compute: seconds; ``seconds``: computing and sending, both ways, in a round.
        devices: that share the windows of a step.
    """

    bits: int
    batch: int
    micro: int
    ranks: dict[str, int]
    tokens: int
    download: int
    compute: float
    devices: int = 1


class Plan(base.Plan):
    """A tuning stage and who does what in it, from round ``since`` on.

    Attributes:
        planner, parametrization: of the stage.
        since: the round from which the plan is in force.
        rounds: of the stage.
        rank: the largest of any client and linear.
        deadline: seconds of a round that were aimed at; None: none.
        total: modelled seconds of all rounds and of measuring the importance, as if this plan stayed in force.
        importance: of each linear, together 1.
        capabilities: what the clients said, by name: why each was given what it was given.
        noise: where windows are protected: of each client, in units of the clipping norm.
    """

    kind: Literal["tune"] = "tune"
    clients: dict[str, Assignment]
    planner: str
    parametrization: str
    since: int = 0
    rounds: int
    rank: int
    deadline: float | None
    total: float
    importance: dict[str, float]
    capabilities: dict[str, Capabilities]
    noise: dict[str, float]

    def widest(self) -> dict[str, int]:
        """The largest rank that any client has of each linear that is tuned."""
        return {name: max(s.ranks.get(name, 0) for s in self.clients.values()) for name in self.tuned()}

    def weights(self, alike: bool) -> dict[str, float]:
        """Public weights that add up to one: by the tokens that clients said they have, or ``alike`` for all."""
        if alike:
            return dict.fromkeys(self.clients, 1 / len(self.clients))
        everything = sum(assignment.tokens for assignment in self.clients.values())
        return {name: assignment.tokens / everything for name, assignment in self.clients.items()}

    def tuned(self) -> list[str]:
        """The linears that some client tunes, in order."""
        return [name for name in self.importance if any(name in s.ranks for s in self.clients.values())]

    def uploads(self) -> int:
        """Bytes that all clients send in all rounds."""
        return self.rounds * super().uploads()


def even(cost: ModelCost) -> dict[str, float]:
    """The importance before anything was measured: the same for all linears."""
    return dict.fromkeys(cost.linears, 1 / len(cost.linears))


def make_plan(
    index: int,
    config: Config,
    cost: ModelCost,
    capabilities: Mapping[str, Capabilities],
    importance: Mapping[str, float],
    since: int = 0,
    together: Callable[[int], int] = lambda clients: 1,
    secure: bool = False,
) -> Plan:
    """Gives each client a configuration: that of the stage's planner.

    Args:
        index: the stage's place in the job.
        cost: of the model.
        capabilities: what the clients said, by name.
        importance: of each linear, together 1.
        together: of so many clients, how many must train a column of an adapter: its sum shall not be one client's.
        secure: sums are taken under secure aggregation.

    Raises:
        FedgroveError: nobody can take part; names one client and the smallest budget that would do.
    """
    method, planner = parametrization_of(config.parametrization), planner_of(config.planner)
    for name, shape in cost.linears.items():
        if method.RANKED and config.ranks[-1] > min(shape):
            raise FedgroveError(
                f"stages.{index}.ranks: {config.ranks[-1]} is more than {name} has ({shape[0]}×{shape[1]})",
                f"give {min(min(shape) for shape in cost.linears.values())} at most",
            )
    number = wire.estimate(1000, 0.0, getattr(torch, config.dtype)) / 1000
    budgets = {name: _budget(client) for name, client in sorted(capabilities.items())}
    bits = {name: client.bits for name, client in capabilities.items()}
    choice = planner.choose(config, Problem(cost, budgets, bits, importance, number))
    configs = choice.configs
    if not configs:
        name, why = min(choice.left_out.items())
        raise FedgroveError(f"{why} (and nobody else can take part either)", client=name)
    if secure:
        configs = _together(configs, together(len(configs)))
    rank = max(rank for one in configs.values() for rank in one.ranks.values())
    kept = {name: max(one.ranks.get(name, 0) for one in configs.values()) for name in cost.linears}
    space = SearchSpace(
        config.bits, config.batches, config.ranks, config.steps, rank if planner.NEEDS_IMPORTANCE else 0, number
    )
    assignments = _assignments(config, method, cost, space, budgets, capabilities, configs, kept)
    measured = 0.0
    if planner.NEEDS_IMPORTANCE:
        times = math.ceil(config.rounds / config.replan_every) if config.replan_every else 1
        measured = times * max(importance_seconds(assignments, config, cost, capabilities).values())
    return Plan(
        stage=index,
        planner=config.planner,
        parametrization=config.parametrization,
        since=since,
        rounds=config.rounds,
        rank=rank,
        deadline=choice.deadline,
        total=round(config.rounds * max(one.seconds for one in assignments.values()) + measured, 3),
        clients=assignments,
        left_out=choice.left_out,
        importance=dict(importance),
        capabilities=dict(sorted(capabilities.items())),
        noise=_noise(config, assignments),
        discloses=base.names_of(_discloses(config, method)),
        notes=tuple(_notes(config, len(assignments), secure)),
    )


def _assignments(
    config: Config,
    method: Parametrization,
    cost: ModelCost,
    space: SearchSpace,
    budgets: Mapping[str, Budget],
    capabilities: Mapping[str, Capabilities],
    configs: Mapping[str, ClientConfig],
    kept: Mapping[str, int],
) -> dict[str, Assignment]:
    """What each client's configuration costs it.

    Args:
        kept: by linear, the largest rank of any client: what goes down.
    """
    down = space.number * method.numbers(cost, kept)
    assignments = {}
    for name, chosen in configs.items():
        client = capabilities[name]
        up = space.number * method.numbers(cost, chosen.ranks)
        if config.precision == "fixed":
            up = 4 * method.numbers(cost, kept, config.aggregation_method.SHARED_A)
        compute = method.compute_seconds(cost, space, budgets[name], chosen)
        sending = (8 * up / client.uplink if client.uplink else 0.0) + (8 * down / client.downlink if client.downlink else 0.0)
        assignments[name] = Assignment(
            bits=chosen.bits,
            batch=chosen.batch,
            micro=chosen.micro,
            ranks={linear: chosen.ranks[linear] for linear in cost.linears if linear in chosen.ranks},
            tokens=client.tokens.get(config.length, 0),
            memory=math.ceil(method.memory(cost, space, chosen)),
            upload=math.ceil(up),
            download=math.ceil(down),
            compute=round(compute, 6),
            seconds=round(compute + sending, 3),
            devices=client.devices,
        )
    return assignments


def _discloses(config: Config, method: Parametrization) -> frozenset[Disclosure]:
    """What a client's responses reveal about its text, over the whole stage."""
    disclosed = frozenset({method.DISCLOSES})
    if config.epsilon is None:
        disclosed |= {Disclosure.LOSS}
    if planner_of(config.planner).NEEDS_IMPORTANCE:
        disclosed |= ScoreLinears.DISCLOSES
    return disclosed | ComparePersonal.DISCLOSES if config.personal else disclosed


def _together(choices: Mapping[str, ClientConfig], enough: int) -> dict[str, ClientConfig]:
    """Lowers ranks until every column is trained by enough clients: what one alone adds to would not be hidden by the sum."""
    most: dict[str, int] = {}
    for name in {name for choice in choices.values() for name in choice.ranks}:
        ranks = sorted((choice.ranks.get(name, 0) for choice in choices.values()), reverse=True)
        most[name] = ranks[enough - 1] if len(ranks) >= enough else 0
    if not any(most.values()):
        raise FedgroveError(
            f"privacy.secure_aggregation: {len(choices)} clients can tune, and no linear is given to {enough} of them, which "
            "it takes to hide one (privacy.min_group)",
            'set method = "lora", or lower privacy.min_group',
        )
    return {
        client: replace(
            choice, ranks={name: min(rank, most[name]) for name, rank in choice.ranks.items() if min(rank, most[name])}
        )
        for client, choice in choices.items()
    }


def _noise(config: Config, assignments: Mapping[str, Assignment]) -> dict[str, float]:
    if config.epsilon is None or not config.trainer_method.PRIVATE:
        return {}
    steps = config.rounds * config.steps
    return {
        name: dp_sgd_noise_multiplier(config.epsilon, config.delta, min(1.0, one.batch * config.length / one.tokens), steps)
        for name, one in assignments.items()
    }


def _notes(config: Config, clients: int, secure: bool) -> list[str]:
    if config.epsilon is None:
        return []
    if config.trainer_method.PRIVATE:
        steps = config.rounds * config.steps
        return [window_statement(config.epsilon, config.delta, config.length, steps, config.dp_clip)]
    sigma = gaussian_noise_multiplier(config.epsilon, config.delta, config.rounds) * config.dp_clip / clients
    if sigma > fixed_point.LARGEST / 16:
        raise FedgroveError(
            f"epsilon: every number would get noise of {sigma:.3g}, which is more than the sum can hold",
            "raise epsilon, or lower dp_clip or rounds",
        )
    adders = min_survivors(clients)
    return [client_statement(config.epsilon, config.delta, config.rounds, config.dp_clip, secure, adders)]


def worth(plan: Plan, config: Config, importance: Mapping[str, float]) -> float:
    """What a plan's ranks would be worth under another importance; see :func:`fedgrove.stages.tune.cost.gain`."""
    return sum(
        importance[name] * costs.gain(rank, config.ranks[-1])
        for assignment in plan.clients.values()
        for name, rank in assignment.ranks.items()
    )


def importance_seconds(
    assignments: Mapping[str, Assignment], config: Config, cost: ModelCost, capabilities: Mapping[str, Capabilities]
) -> dict[str, float]:
    """Seconds of computing until each client has measured the importance."""
    space = SearchSpace(config.bits, config.batches, config.ranks, config.importance_steps)
    ranks = dict.fromkeys(cost.linears, RANK)
    return {
        name: costs.compute_seconds(
            cost, space, Budget(speed=SPEED * capabilities[name].speed), ClientConfig(32, one.micro, 1, ranks)
        )
        for name, one in assignments.items()
    }


def _budget(client: Capabilities) -> Budget:
    return Budget(
        memory=client.memory or math.inf,
        speed=SPEED * client.speed,
        uplink=client.uplink / 8 if client.uplink else math.inf,
        devices=client.devices,
    )
