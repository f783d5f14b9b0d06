"""The same configuration for all clients: the best that fits the weakest client. The baseline of the FedPipe paper."""

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
    """Chooses the first of the parametrization's configurations that fits all clients, with the largest batch.

    Clients that no configuration fits are left out. Each client gets the largest micro-batch that fits in its memory.

    Raises:
        FedgroveError: every remaining client can hold some configuration, but no configuration fits all of them.
    """
    method = parametrization_of(config.parametrization)
    space = SearchSpace(config.bits, config.batches, config.ranks, config.steps, 0, problem.number)
    candidates = method.configurations(space, problem.cost, config.batches[-1])

    def fits(client: str, candidate: ClientConfig) -> bool:
        # bits that are not in the job are fixed by the parametrization, such as 32 for "full"
        allowed = candidate.bits in problem.bits[client] or candidate.bits not in config.bits
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
        most = max(candidates, key=lambda candidate: sum(fits(client, candidate) for client in able))
        odd = next(client for client in able if not fits(client, most))
        raise FedgroveError(
            f'planner "uniform": no value of bits fits all clients, and {most.bits} bits do not fit this one',
            "allow more values in bits",
            client=odd,
        )
    return Choice({}, left_out)
