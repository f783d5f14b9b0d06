"""How a client trains in a round: a new trainer is a new file here; its file name is its name in the job."""

from __future__ import annotations

from typing import Any, Protocol, cast

from fedgrove import plugins
from fedgrove.models.cost import ModelCost
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.training import Work

PACKAGE = "stages.tune.trainers"


class Trainer(Protocol):
    """The contract of a trainer's file.

    Attributes:
        PRIVATE: whether it adds noise, so that training is differentially private for single windows of text.
        TAKES: the forms of change that it trains; see :mod:`fedgrove.stages.tune.aggregation`.
        WITHOUT_GRADIENTS: whether there is no backward pass.
        FALLBACK: the trainer of clients whose memory is too small for this one, whose numbers add up with its own; None: such
            clients are left out.
    """

    PRIVATE: bool
    WITHOUT_GRADIENTS: bool
    FALLBACK: str | None
    TAKES: frozenset[Form]

    def train(self, model: Any, work: Work, settings: Any) -> Any:
        """Trains a model on a client's windows.

        Args:
            model: with gradients, the model whose parameters that require one are trained; for "coefficients", a
                :class:`~fedgrove.stages.tune.seeds.two_sided.TwoSided`.
            work: the windows, and the privacy budget.
            settings: :class:`~fedgrove.stages.tune.training.Settings`, or
                :class:`~fedgrove.stages.tune.seeds.steps.Steps` for "coefficients".

        Returns:
            The mean loss per token, None if it may not be disclosed; for "coefficients", a
            :class:`~fedgrove.stages.tune.seeds.steps.Taken`.

        Raises:
            NotFinite: the loss is not finite. A trainer with noise never raises it: whether a window is there must not show.
            FedgroveError: the noise is too small for the budget.
        """
        ...


class Demanding(Trainer, Protocol):
    """The contract of a trainer that has a ``FALLBACK``."""

    def memory(self, cost: ModelCost) -> float:
        """Bytes at the peak of training, without the process itself."""
        ...

    def compute_seconds(self, cost: ModelCost, windows: int, speed: float) -> float:
        """Seconds of computation in a round of so many windows.

        Args:
            speed: floating-point operations per second.
        """
        ...


METHOD = Trainer


def demanding_of(name: str) -> Demanding:
    """Loads a trainer that has a ``FALLBACK``."""
    return cast(Demanding, plugins.load(PACKAGE, name, Demanding))


def trainer_of(name: str) -> Trainer:
    """Loads a trainer by name."""
    return cast(Trainer, plugins.load(PACKAGE, name))
