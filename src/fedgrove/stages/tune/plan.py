"""The plan of a tuning stage: each client's configuration, by its capabilities. The same inputs give the same plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from fedgrove.errors import FedgroveError
from fedgrove.models.cost import ModelCost
from fedgrove.rounds import wire
from fedgrove.rounds.capabilities import SPEED, Capabilities
from fedgrove.rounds.request import Disclosure
from fedgrove.stages import base
from fedgrove.stages.tune import cost as modeled
from fedgrove.stages.tune import promises
from fedgrove.stages.tune.assignments import Assignment, assignments_of
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.exchanges.experts import ChooseExperts
from fedgrove.stages.tune.exchanges.importance import ScoreLinears
from fedgrove.stages.tune.exchanges.personal import ComparePersonal
from fedgrove.stages.tune.exchanges.seeds import measuring_rounds, measuring_share, perturbations_of, rank_of
from fedgrove.stages.tune.holding import (
    NOTHING_CHOSEN,
    Chosen,
    check_group,
    check_mixture,
    costs_of,
    numbers_held,
)
from fedgrove.stages.tune.importance import RANK, SKETCH
from fedgrove.stages.tune.objective import Gradients, pace
from fedgrove.stages.tune.parametrizations import Parametrization, parametrization_of
from fedgrove.stages.tune.planners import Problem, planner_of

NOT_MEASURED = Gradients()


class Plan(base.Plan):
    """The clients' assignments from round ``since`` on.

    Attributes:
        planner, parametrization: names.
        since: the first round in which the plan is in force.
        rounds: number of rounds of the stage.
        rank: the largest rank of all clients and linears.
        deadline: seconds that the planner allowed for a round; None: no deadline.
        total: modelled seconds of all rounds and of measuring the importance, if this plan stays in force.
        importance: of each linear; adds up to 1.
        coherence, kept: see :class:`~fedgrove.stages.tune.objective.Gradients`.
        capabilities: by client; the assignments follow from them.
        noise: by client, the noise multiplier of DP-SGD, in units of the clipping norm; empty without DP-SGD.
        experts: of every block that has any, how many experts the model has; None: it has none.
        min_group: an expert changes in a round if so many clients trained it.
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
    coherence: float | None = None
    kept: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    capabilities: dict[str, Capabilities]
    noise: dict[str, float]
    experts: int | None = None
    min_group: int = 1

    def widest(self) -> dict[str, int]:
        """By linear, the largest rank of any client; only linears that are tuned."""
        return {name: max(s.ranks.get(name, 0) for s in self.clients.values()) for name in self.tuned()}

    def tuned(self) -> list[str]:
        """The linears that at least one client tunes, in the model's order."""
        return [name for name in self.importance if any(name in s.ranks for s in self.clients.values())]

    @property
    def gradients(self) -> Gradients:
        """What the clients measured of their gradients."""
        return Gradients(self.coherence, self.kept)

    def uploads(self) -> int:
        """Bytes that all clients send in all rounds."""
        return self.rounds * super().uploads()


def even(cost: ModelCost) -> dict[str, float]:
    """The importance before it is measured: the same for all linears."""
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
    alone: bool = False,
    min_group: int = 1,
    chosen: Chosen = NOTHING_CHOSEN,
    gradients: Gradients = NOT_MEASURED,
) -> Plan:
    """Makes the plan of a stage: the stage's planner chooses each client's configuration.

    Args:
        index: of the stage in the job.
        cost: of the model.
        capabilities: by client.
        importance: of each linear; adds up to 1.
        since: the first round in which the plan is in force.
        together: given the number of clients, how many of them must train each column of an adapter, so that no sum
            reveals a single client, even if some drop out; only used if ``secure``.
        secure: sums are taken under secure aggregation.
        alone: whether the model that each client would have without the others is measured too.
        min_group: the smallest number of clients that may change an expert.
        chosen: which experts the clients hold; before they have chosen, nothing.
        gradients: what the clients measured of their gradients.

    Raises:
        FedgroveError: no client can take part (names one client and what it lacks), a rank is larger than a linear
            allows, something cannot be done with experts, too few clients train the same linear for secure aggregation, or
            ``epsilon`` needs too much noise.
    """
    method, planner = parametrization_of(config.parametrization), planner_of(config.planner)
    for name, shape in cost.linears.items():
        if (method.RANKED or rank_of(config)) and config.ranks[-1] > min(shape):
            raise FedgroveError(
                f"stages.{index}.ranks: {config.ranks[-1]} is too large for {name} ({shape[0]}×{shape[1]})",
                f"give {min(min(shape) for shape in cost.linears.values())} at most",
            )
    check_mixture(index, config, planner, cost)
    number = wire.estimate(1000, 0.0, getattr(torch, config.dtype)) / 1000
    passes = 2 if config.personal_pull else 1  # a client that also trains a change of its own has half the speed
    budgets = {name: _budget(client, passes) for name, client in sorted(capabilities.items())}
    bits = {name: client.bits for name, client in capabilities.items()}
    problem = Problem(dict.fromkeys(budgets, cost), budgets, bits, importance, number, gradients)
    held = numbers_held(config, planner, cost, problem)
    costs = costs_of(cost, held, chosen) if held else problem.costs
    choice = planner.choose(config, replace(problem, costs=costs))
    configs = choice.configs
    if not configs:
        name, why = min(choice.left_out.items())
        raise FedgroveError(f"{why} (and no other client can take part either)", client=name)
    check_group(config, cost, len(configs), min_group, choice.left_out)
    if secure and held:  # who holds which experts is not known, so all get the ranks of all linears
        configs = {name: replace(one, ranks=_of_all(one.ranks, cost)) for name, one in configs.items()}
    if chosen.few:
        configs = {name: replace(one, ranks=_without(one.ranks, chosen.few)) for name, one in configs.items()}
    if method.BY_WINDOWS:
        configs = _dealt(config, configs, {name: client.tokens.get(config.length, 0) for name, client in capabilities.items()})
    if secure:
        configs = _together(configs, together(len(configs)))
    rank = max(rank for one in configs.values() for rank in one.ranks.values())
    kept = {name: max(one.ranks.get(name, 0) for one in configs.values()) for name in cost.linears}
    space = SearchSpace(
        config.bits, config.batches, config.ranks, config.steps, rank if planner.NEEDS_IMPORTANCE else 0, number
    )
    assignments = assignments_of(config, method, cost, costs, space, budgets, capabilities, configs, kept)
    measured = 0.0
    if planner.NEEDS_IMPORTANCE:
        measured = len(config.planning_rounds) * max(importance_seconds(assignments, config, costs, capabilities).values())
    elif config.measures_settings:
        again = len(measuring_rounds(config)) - 1
        share = measuring_share(len(perturbations_of(config)), config.steps) + again * measuring_share(1, config.steps)
        measured = share * max(one.compute for one in assignments.values())
    return Plan(
        stage=index,
        planner=config.planner,
        parametrization=config.parametrization,
        since=since,
        rounds=config.rounds,
        rank=rank,
        deadline=choice.deadline,
        total=round(config.rounds * max(one.seconds for one in assignments.values()) + measured, 3),
        clients={name: one.model_copy(update={"experts": held.get(name)}) for name, one in assignments.items()},
        left_out=choice.left_out,
        importance=dict(importance),
        coherence=gradients.coherence,
        kept=dict(gradients.kept),
        capabilities=dict(sorted(capabilities.items())),
        noise=promises.noise(config, assignments),
        discloses=base.names_of(_discloses(config, method, secure, alone, cost, held)),
        notes=tuple(promises.notes(config, assignments, secure)),
        experts=None if cost.experts is None else cost.experts.routing.experts,
        min_group=min(min_group, len(assignments)),
    )


def _dealt(config: Config, choices: Mapping[str, ClientConfig], tokens: Mapping[str, int]) -> dict[str, ClientConfig]:
    """Deals the windows of a step out in proportion to the clients' text, one at least, and each computed by itself.

    So the mean over a step's windows is that of the pooled text. If noise protects a client, all have the same number.
    """
    if config.epsilon is not None and not config.trainer_method.PRIVATE:
        return {name: replace(choice, micro=1) for name, choice in choices.items()}
    total, everything = sum(choice.batch for choice in choices.values()), sum(tokens[name] for name in choices)
    return {
        name: replace(choice, batch=max(1, round(total * tokens[name] / everything)), micro=1)
        for name, choice in choices.items()
    }


def _discloses(
    config: Config, method: Parametrization, secure: bool, alone: bool, cost: ModelCost, held: Mapping[str, int]
) -> frozenset[Disclosure]:
    """What a client's responses reveal about its text in the whole stage."""
    disclosed = frozenset({method.DISCLOSES})
    if config.epsilon is None and (method.SUMS_LOSS or not secure):
        disclosed |= {Disclosure.LOSS}
    if cost.experts is not None and config.epsilon is None and method.FORM != "coefficients":
        disclosed |= {Disclosure.EXPERT_TOKENS}
        if secure or any(number < cost.experts.routing.experts for number in held.values()):
            disclosed |= ChooseExperts.DISCLOSES
    if config.measures_settings:
        disclosed |= {Disclosure.CURVATURE}
    if planner_of(config.planner).NEEDS_IMPORTANCE:
        disclosed |= ScoreLinears.DISCLOSES
    if alone and method.ALONE:
        disclosed |= {Disclosure.WINDOW_LOSSES}
    return disclosed | ComparePersonal.DISCLOSES if config.personal else disclosed


def _together(choices: Mapping[str, ClientConfig], enough: int) -> dict[str, ClientConfig]:
    """Lowers ranks so that ``enough`` clients train every column: a sum must not reveal the change of one client."""
    most: dict[str, int] = {}
    for name in {name for choice in choices.values() for name in choice.ranks}:
        ranks = sorted((choice.ranks.get(name, 0) for choice in choices.values()), reverse=True)
        most[name] = ranks[enough - 1] if len(ranks) >= enough else 0
    if not any(most.values()):
        raise FedgroveError(
            f"privacy.secure_aggregation: {len(choices)} clients can tune, but no linear is assigned to {enough} of them, "
            "the number needed to hide one client in a sum (privacy.min_group)",
            'set method = "lora", or lower privacy.min_group',
        )
    return {
        client: replace(
            choice, ranks={name: min(rank, most[name]) for name, rank in choice.ranks.items() if min(rank, most[name])}
        )
        for client, choice in choices.items()
    }


def progress(plan: Plan, config: Config, importance: Mapping[str, float], gradients: Gradients) -> float:
    """What a round of a plan is worth: the mean over clients, by their weight, of the objective of :mod:`.objective`."""
    worth, total, everything = gradients.worth(importance, config.ranks), 0.0, 0.0
    for one in plan.clients.values():
        weight = min(one.tokens, config.most_tokens)
        ranks = sum(worth[name][config.ranks.index(rank)] for name, rank in one.ranks.items())
        total, everything = total + weight * pace(one.steps, one.batch, gradients.noise) * ranks, everything + weight
    return total / everything


def importance_seconds(
    assignments: Mapping[str, Assignment],
    config: Config,
    costs: Mapping[str, ModelCost],
    capabilities: Mapping[str, Capabilities],
) -> dict[str, float]:
    """Seconds of computation that each client needs to score the linears."""
    space = SearchSpace(config.bits, config.batches, config.ranks, config.importance_steps)
    seconds = {}
    for name, one in assignments.items():
        scored = ClientConfig(32, one.micro, 1, dict.fromkeys(costs[name].linears, RANK + min(SKETCH, config.ranks[-1])))
        budget = Budget(speed=SPEED * capabilities[name].speed)
        seconds[name] = modeled.compute_seconds(costs[name], space, budget, scored)
    return seconds


def _of_all(ranks: Mapping[str, int], cost: ModelCost) -> dict[str, int]:
    """The same rank for all linears; only planners whose ranks are all the same come here."""
    return dict.fromkeys(cost.linears, max(ranks.values()))


def _without(ranks: Mapping[str, int], names: Collection[str]) -> dict[str, int]:
    return {name: rank for name, rank in ranks.items() if name not in names}


def _budget(client: Capabilities, passes: int) -> Budget:
    return Budget(
        memory=client.memory or math.inf,
        speed=SPEED * client.speed / passes,
        uplink=client.uplink / 8 if client.uplink else math.inf,
        devices=client.devices,
    )
