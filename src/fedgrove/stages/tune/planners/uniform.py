"""The same for all: the best configuration that the weakest client can hold. The baseline of FedPipe's paper."""

from __future__ import annotations

from fedgrove.errors import FedgroveError
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.cost import ClientConfig, SearchSpace, widest
from fedgrove.stages.tune.parametrizations import parametrization_of
from fedgrove.stages.tune.planners import Choice, Problem

NEEDS_IMPORTANCE = False
NEEDS_RANKS = False
EQUAL_RANKS = True


def choose(config: Config, problem: Problem) -> Choice:
    """The first of the parametrization's configurations that every client can hold which can hold any; the largest batch."""
    method = parametrization_of(config.parametrization)
    space = SearchSpace(config.bits, config.batches, config.ranks, config.steps, 0, problem.number)
    candidates = method.configurations(space, problem.cost, config.batches[-1])

    def fits(client: str, candidate: ClientConfig) -> bool:
        allowed = candidate.bits in problem.bits[client] or candidate.bits not in config.bits  # what is not chosen is given
        return allowed and method.memory(problem.cost, space, candidate) <= problem.budgets[client].memory

    left_out = {
        client: method.shortage(problem.cost, space, budget)
        for client, budget in problem.budgets.items()
        if not any(fits(client, candidate) for candidate in candidates)
    }
    able = [client for client in problem.budgets if client not in left_out]
    for candidate in candidates:
        if able and all(fits(client, candidate) for client in able):
            configs = {
                client: widest(problem.cost, space, problem.budgets[client], candidate, method.memory) for client in able
            }
            return Choice(configs, left_out)
    if able:
        raise FedgroveError(
            'planner "uniform": the clients have no bits in common that all can hold', "allow more values in bits"
        )
    return Choice({}, left_out)
