"""FedPipe (arXiv 2404.06448): optimizes each client's bits, batch and ranks within its memory, time and uplink.

Ours: the objective and the linear formulation (see :mod:`fedgrove.stages.tune.cost`); clients with equal budgets are
solved once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedgrove.models.cost import ModelCost
from fedgrove.stages.tune import cost
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.cost import Budget, ClientConfig, Infeasible, SearchSpace
from fedgrove.stages.tune.planners import Choice, Problem

NEEDS_IMPORTANCE = True
NEEDS_RANKS = True
EQUAL_RANKS = False


def choose(config: Config, problem: Problem) -> Choice:
    """Solves :func:`fedgrove.stages.tune.cost.best` for each client."""
    space = SearchSpace(
        config.bits, config.batches, config.ranks, config.steps, config.ranks[-1], problem.number, config.upload_price
    )
    deadline = config.deadline or default_deadline(problem.cost, space, problem.budgets)
    solved: dict[tuple[Budget, SearchSpace], ClientConfig | Infeasible] = {}
    chosen, left_out = {}, {}
    for client, given in problem.budgets.items():
        budget = replace(given, seconds=deadline)
        bits = tuple(b for b in sorted(config.bits, reverse=True) if b in problem.bits[client])
        client_space = replace(space, bits=bits)
        if (budget, client_space) not in solved:
            try:
                if not bits:
                    raise Infeasible(
                        f"it supports none of bits = {list(config.bits)} (clients.bits; 8 and 4 need bitsandbytes)"
                    )
                solved[budget, client_space] = cost.best(problem.cost, client_space, budget, problem.importance)
            except Infeasible as error:
                solved[budget, client_space] = error
        answer = solved[budget, client_space]
        if isinstance(answer, ClientConfig):
            chosen[client] = answer
        else:
            left_out[client] = str(answer)
    return Choice(chosen, left_out, deadline)


def default_deadline(model: ModelCost, space: SearchSpace, budgets: Mapping[str, Budget]) -> float:
    """The slowest client's seconds for the smallest batch and ranks: small batches learn more in the same time."""
    least = ClientConfig(space.bits[0], space.batches[0], 1, dict.fromkeys(model.linears, space.ranks[0]))
    return max(cost.seconds(model, space, budget, least) for budget in budgets.values())
