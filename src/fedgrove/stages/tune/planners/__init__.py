"""Who gets what: a configuration for each client, by what it has. A new planner is a new file here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from fedgrove import plugins
from fedgrove.models.cost import ModelCost
from fedgrove.stages.tune.cost import Budget, ClientConfig

if TYPE_CHECKING:  # the stage's table names its planner, so it imports this package
    from fedgrove.stages.tune.config import Config

PACKAGE = "stages.tune.planners"


@dataclass(frozen=True)
class Problem:
    """What a planner chooses from.

    Attributes:
        cost: of the model.
        budgets: of each client, by name.
        bits: in which each client can hold frozen weights.
        importance: of each linear, together 1.
        number: bytes of a number on the wire.
    """

    cost: ModelCost
    budgets: Mapping[str, Budget]
    bits: Mapping[str, tuple[int, ...]]
    importance: Mapping[str, float]
    number: float


@dataclass(frozen=True)
class Choice:
    """What a planner chose.

    Attributes:
        configs: of each client that takes part.
        left_out: client -> which budget is too small, and what would do.
        deadline: seconds of a round that were aimed at; None: no deadline.
    """

    configs: dict[str, ClientConfig]
    left_out: dict[str, str]
    deadline: float | None = None


class Planner(Protocol):
    """What a planner's file holds.

    Attributes:
        NEEDS_IMPORTANCE: whether clients score the linears before it plans.
        NEEDS_RANKS: whether it chooses ranks, which not every parametrization has.
        EQUAL_RANKS: whether it gives all clients the same ranks.
    """

    NEEDS_IMPORTANCE: bool
    NEEDS_RANKS: bool
    EQUAL_RANKS: bool

    def choose(self, config: Config, problem: Problem) -> Choice:
        """Gives each client a configuration, or leaves it out.

        Raises:
            FedgroveError: the clients have nothing in common that all can hold.
        """
        ...


METHOD = Planner


def planner_of(name: str) -> Planner:
    """The planner of that name."""
    return cast(Planner, plugins.load(PACKAGE, name))
