"""How many experts of every block a client of little memory holds, and how many one keeps in a model of its own.

FedMoE (arXiv 2408.11304) chooses for each layer the smallest set of experts that gets a share θ of the client's tokens, with
the largest θ that fits the memory, and sends the shares to the server. Ours: the number is planned from the memory alone, and
the client chooses which they are by sums over its own text (``expert_value``). All experts of a model are of one size, and
every block has to keep as many, because config.json has one number; so the best of every block solve that knapsack.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fedgrove.errors import FedgroveError
from fedgrove.models.cost import ModelCost
from fedgrove.models.depth import parts_of
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.parametrizations import parametrization_of
from fedgrove.stages.tune.planners import Planner, Problem


def numbers_held(config: Config, planner: Planner, cost: ModelCost, problem: Problem) -> dict[str, int]:
    """For each client the largest number of experts of every block with which it can take part; by default all.

    A client that cannot take part with the fewest either gets these: the planner then says what it lacks.

    Args:
        cost: of the whole model.
        problem: its ``costs`` are ignored.
    """
    if cost.experts is None:
        return {}
    routing = cost.experts.routing
    numbers = routing.numbers if _can_hold_some(config) else [routing.experts]
    smaller = {number: cost.holding(number) for number in numbers}

    def lacks(client: str, number: int) -> bool:
        if number < routing.experts and choosing_bytes(cost) > problem.budgets[client].memory:
            return True
        return not planner.fits(config, replace(problem, costs={client: smaller[number]}), client)

    held = {}
    for client in problem.budgets:
        found = bisect.bisect_left(numbers, True, key=lambda number: lacks(client, number))
        held[client] = numbers[max(found - 1, 0)]
    return held


def _can_hold_some(config: Config) -> bool:
    """Whether clients may hold some experts: which ones depends on their text, and gets no noise; "seeds" moves all weights."""
    return (
        config.hold_experts == "fit"
        and config.epsilon is None
        and parametrization_of(config.parametrization).FORM != "coefficients"
    )


def choosing_bytes(cost: ModelCost) -> int:
    """Bytes at the peak of the forward pass by which a client chooses its experts: block by block, in float32."""
    blocks: dict[int, int] = {}
    for name, (rows, columns) in cost.linears.items():
        parts = parts_of(name)
        assert parts is not None
        blocks[parts[1]] = blocks.get(parts[1], 0) + rows * columns
    return 4 * (max(cost.others, *blocks.values()) + cost.saved)


def check_mixture(index: int, config: Config, planner: Planner, cost: ModelCost) -> None:
    """Refuses what cannot be done with a mixture of experts.

    Args:
        index: of the stage in the job.

    Raises:
        FedgroveError: names the key and the remedy.
    """
    at = f"stages.{index}"
    if cost.experts is None:
        if config.personal_experts:
            raise FedgroveError(f"{at}.personal_experts: the model has no experts", "set it to 0")
        return
    if config.personal:
        raise FedgroveError(
            f"{at}.personal: plain peft has no adapters for single experts, so no client can keep one of its own",
            "set it to 0, or have clients keep the experts that matter to them: personal_experts = 0.5",
        )
    if planner.NEEDS_IMPORTANCE and config.precision == "fixed":
        raise FedgroveError(
            f'{at}.planner: with experts and precision "fixed", all clients need the same ranks', 'set method = "lora"'
        )
    if config.personal_experts:
        kept_of_own(index, config, cost)


def check_group(
    config: Config, cost: ModelCost, clients: int, min_group: int, left_out: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Refuses a job in which no expert could change. One client alone, whose text is all there is, may change any.

    Args:
        clients: how many take part.
        min_group: see :class:`fedgrove.job.tables.Privacy`.
        left_out: by client, why it cannot take part.

    Raises:
        FedgroveError: several clients take part, but fewer than have to train an expert.
    """
    seeds = parametrization_of(config.parametrization).FORM == "coefficients"  # every step moves all experts, for all clients
    if cost.experts is not None and not seeds and 1 < clients < min_group:
        if left_out:
            client, why = min(left_out.items())
            raise FedgroveError(
                f"{why} (and without it too few are left to change an expert: privacy.min_group)", client=client
            )
        raise FedgroveError(
            f"privacy.min_group: an expert changes only if {min_group} clients train it, but {clients} take part",
            f"set it to {clients}",
        )


def kept_of_own(index: int, config: Config, cost: ModelCost) -> int:
    """How many experts of every block a client keeps in a model of its own.

    Raises:
        FedgroveError: the router needs more, or it is all of them.
    """
    assert cost.experts is not None
    routing = cost.experts.routing
    number = routing.left(1 - config.personal_experts)
    if number < routing.fewest or number == routing.experts:
        low, high = routing.fewest / routing.experts, 1 - routing.groups / routing.experts
        raise FedgroveError(
            f"stages.{index}.personal_experts: {config.personal_experts:g} of {routing.experts} experts is {number}, but the "
            f"router takes {routing.fewest} at least, and all of them are no smaller model",
            f"give {low:.2g} to {high:.2g}, or 0" if low <= high else "set it to 0",
        )
    return number


@dataclass(frozen=True)
class Chosen:
    """What is known of the clients' experts once they have chosen them.

    Attributes:
        linears: by client, the linears that it holds: of clients that hold some experts, if the server knows which.
        few: linears of experts that too few clients hold, which nobody trains.
    """

    linears: Mapping[str, frozenset[str]] = field(default_factory=dict)
    few: frozenset[str] = frozenset()


def costs_of(cost: ModelCost, held: Mapping[str, int], chosen: Chosen) -> dict[str, ModelCost]:
    """By client, the model as it holds it; clients that hold as many experts share one, while it is not known which.

    Args:
        held: by client, how many experts.
    """
    names = chosen.linears
    by_number = {number: cost.holding(number) for number in set(held.values())}
    return {
        client: cost.holding(number, names[client]) if client in names else by_number[number] for client, number in held.items()
    }


NOTHING_CHOSEN = Chosen()
