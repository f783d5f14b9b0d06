"""Planners: choose each client's configuration by its budget. A new planner is a new file here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

from fedgrove import plugins
from fedgrove.models.cost import ModelCost
from fedgrove.stages.tune.cost import Budget, ClientConfig
from fedgrove.stages.tune.objective import Gradients

if TYPE_CHECKING:  # the stage's table names its planner, so it imports this package
    from fedgrove.stages.tune.config import Config

PACKAGE = "stages.tune.planners"


@dataclass(frozen=True)
class Problem:
    """The inputs of a planner.

    Attributes:
        costs: by client, of the model as it holds it: of a mixture of experts, with as many experts as it has memory for.
        budgets: by client.
        bits: by client, the numbers of bits in which it can store frozen weights.
        importance: of each linear; adds up to 1.
        number: bytes of one number on the wire.
        gradients: what the clients measured of their gradients; by default nothing.
    """

    costs: Mapping[str, ModelCost]
    budgets: Mapping[str, Budget]
    bits: Mapping[str, tuple[int, ...]]
    importance: Mapping[str, float]
    number: float
    gradients: Gradients = field(default_factory=Gradients)


@dataclass(frozen=True)
class Choice:
    """The result of a planner.

    Attributes:
        configs: by client, for those that take part.
        left_out: by client, why it cannot take part, and what would be enough.
        deadline: seconds allowed for a round; None: no deadline.
    """

    configs: dict[str, ClientConfig]
    left_out: dict[str, str]
    deadline: float | None = None


class Planner(Protocol):
    """The contract of a planner's file.

    Attributes:
        NEEDS_IMPORTANCE: whether clients must score the linears first.
        NEEDS_RANKS: whether it chooses ranks, which not every parametrization has.
        EQUAL_RANKS: whether it gives all clients the same ranks.
        CHOOSES_STEPS: whether it chooses how many steps a client takes in a round, up to ``max_steps``.
    """

    NEEDS_IMPORTANCE: bool
    NEEDS_RANKS: bool
    EQUAL_RANKS: bool
    CHOOSES_STEPS: bool

    def fits(self, config: Config, problem: Problem, client: str) -> bool:
        """Whether a client has memory for any configuration that this planner gives."""
        ...

    def choose(self, config: Config, problem: Problem) -> Choice:
        """Gives each client a configuration, or leaves it out.

        Raises:
            FedgroveError: the planner needs one configuration for all clients, and none fits all of them.
        """
        ...


METHOD = Planner


def planner_of(name: str) -> Planner:
    """Loads a planner by name."""
    return cast(Planner, plugins.load(PACKAGE, name))
