"""How a client trains in a round: a new trainer is a new file here; its file name is its name in the job."""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn

from fedgrove import plugins
from fedgrove.stages.tune.training import Settings, Work

PACKAGE = "stages.tune.trainers"


class Trainer(Protocol):
    """The contract of a trainer's file.

    Attributes:
        PRIVATE: whether it adds noise, so that training is differentially private for single windows of text.
    """

    PRIVATE: bool

    def train(self, model: nn.Module, work: Work, settings: Settings) -> float | None:
        """Trains the parameters that require a gradient.

        Returns:
            The mean loss per token; None if it may not be disclosed.

        Raises:
            NotFinite: the loss is not finite. A trainer with noise never raises it: whether a window is there must not show.
            FedgroveError: the noise is too small for the budget.
        """
        ...


METHOD = Trainer


def trainer_of(name: str) -> Trainer:
    """Loads a trainer by name."""
    return cast(Trainer, plugins.load(PACKAGE, name))
