"""FedPipe (arXiv 2404.06448): optimizes each client's bits, batch, steps and ranks within its memory, time and uplink.

Ours: the objective (:mod:`fedgrove.stages.tune.objective`) and the linear formulation (:mod:`fedgrove.stages.tune.cost`);
clients with equal budgets are solved once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from fedgrove.models.cost import ModelCost
from fedgrove.stages.tune import cost
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.knapsack import Infeasible
from fedgrove.stages.tune.planners import Choice, Problem

NEEDS_IMPORTANCE = True
NEEDS_RANKS = True
EQUAL_RANKS = False
CHOOSES_STEPS = True


def fits(config: Config, problem: Problem, client: str) -> bool:
    """Whether the smallest configuration fits the memory, in any number of bits that the client can store."""
    space = _space(config, problem)
    bits = tuple(b for b in config.bits if b in problem.bits[client])
    model, budget = problem.costs[client], replace(problem.budgets[client], seconds=math.inf)
    return bool(bits) and cost.memory(model, space, cost.least(model, replace(space, bits=bits))) <= budget.memory


def choose(config: Config, problem: Problem) -> Choice:
    """Solves :func:`fedgrove.stages.tune.cost.best` for each client."""
    space, worth = _space(config, problem), problem.gradients.worth(problem.importance, config.ranks)
    deadline = config.deadline or default_deadline(problem.costs, space, problem.budgets)
    solved: dict[tuple[Budget, SearchSpace, int], ClientConfig | Infeasible] = {}
    chosen, left_out = {}, {}
    for client, given in problem.budgets.items():
        budget = replace(given, seconds=deadline)
        bits = tuple(b for b in sorted(config.bits, reverse=True) if b in problem.bits[client])
        key = budget, replace(space, bits=bits), id(problem.costs[client])
        if key not in solved:
            try:
                if not bits:
                    raise Infeasible(
                        f"it supports none of bits = {list(config.bits)} (clients.bits; 8 and 4 need bitsandbytes)"
                    )
                solved[key] = cost.best(problem.costs[client], key[1], budget, worth)
            except Infeasible as error:
                solved[key] = error
        answer = solved[key]
        if isinstance(answer, ClientConfig):
            chosen[client] = answer
        else:
            left_out[client] = str(answer)
    return Choice(chosen, left_out, deadline)


def default_deadline(models: Mapping[str, ModelCost], space: SearchSpace, budgets: Mapping[str, Budget]) -> float:
    """The slowest client's seconds for ``steps`` of the smallest batch, all linears at the largest rank.

    A round is then no longer than one of uniform LoRA, and its clients have time for any rank: with the time for the smallest
    ranks only, clients that are all alike would be left those, and sending would take as long as training. Ours.
    """

    def largest(model: ModelCost) -> ClientConfig:
        return ClientConfig(space.bits[0], space.batches[0], 1, dict.fromkeys(model.linears, space.ranks[-1]))

    longest = max(cost.seconds(models[name], space, budget, largest(models[name])) for name, budget in budgets.items())
    return longest * (1 + 1e-9)  # so that what takes exactly as long fits


def _space(config: Config, problem: Problem) -> SearchSpace:
    return SearchSpace(
        config.bits,
        config.batches,
        config.ranks,
        config.steps,
        config.ranks[-1],
        problem.number,
        config.upload_price,
        config.max_steps,
        problem.gradients.noise,
    )
