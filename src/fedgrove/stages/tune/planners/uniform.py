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
CHOOSES_STEPS = False


def fits(config: Config, problem: Problem, client: str) -> bool:
    """Whether any of the parametrization's configurations fits the memory, with the largest batch, one window at once."""
    return any(_fits(config, problem, client, candidate) for candidate in _candidates(config, problem, client))


def choose(config: Config, problem: Problem) -> Choice:
    """Chooses the first of the parametrization's configurations that fits all clients, with the largest batch.

    Clients that no configuration fits are left out. Each client gets the largest micro-batch that fits in its memory.

    Raises:
        FedgroveError: every remaining client can hold some configuration, but no configuration fits all of them.
    """
    method, space = parametrization_of(config.parametrization), _space(config, problem)
    candidates = {client: _candidates(config, problem, client) for client in problem.budgets}
    able = {
        client: [_fits(config, problem, client, candidate) for candidate in of_client]
        for client, of_client in candidates.items()
    }
    left_out = {
        client: method.shortage(problem.costs[client], space, problem.budgets[client])
        for client, possible in able.items()
        if not any(possible)
    }
    able = {client: possible for client, possible in able.items() if client not in left_out}
    if not able:
        return Choice({}, left_out)
    places = range(len(next(iter(able.values()))))  # of the candidates, which are the same for all but for the linears
    place = next((place for place in places if all(possible[place] for possible in able.values())), None)
    if place is not None:
        configs = {
            client: widest(problem.costs[client], space, problem.budgets[client], candidates[client][place], method.memory)
            for client in able
        }
        return Choice(configs, left_out)
    most = max(places, key=lambda place: sum(possible[place] for possible in able.values()))
    odd = next(client for client, possible in able.items() if not possible[most])
    raise FedgroveError(
        f'planner "uniform": no value of bits fits all clients, and {candidates[odd][most].bits} bits do not fit this one',
        "allow more values in bits",
        client=odd,
    )


def _fits(config: Config, problem: Problem, client: str, candidate: ClientConfig) -> bool:
    # bits that are not in the job are fixed by the parametrization, such as 32 for "full"
    allowed = candidate.bits in problem.bits[client] or candidate.bits not in config.bits
    need = parametrization_of(config.parametrization).memory(problem.costs[client], _space(config, problem), candidate)
    return allowed and need <= problem.budgets[client].memory


def _candidates(config: Config, problem: Problem, client: str) -> list[ClientConfig]:
    method = parametrization_of(config.parametrization)
    return method.configurations(_space(config, problem), problem.costs[client], config.batches[-1])


def _space(config: Config, problem: Problem) -> SearchSpace:
    return SearchSpace(config.bits, config.batches, config.ranks, config.steps, 0, problem.number)
