"""How a client trains in a round: a new trainer is a new file here; its file name is its name in the job."""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn

from fedgrove import plugins
from fedgrove.stages.tune.training import Settings, Work

PACKAGE = "stages.tune.trainers"


class Trainer(Protocol):
    """What a trainer's file holds.

    Attributes:
        PRIVATE: whether it adds noise, so that no window of the text can be told from what was learnt.
    """

    PRIVATE: bool

    def train(self, model: nn.Module, work: Work, settings: Settings) -> float | None:
        """Trains what requires a gradient.

        Returns:
            The mean loss a token, where it may be disclosed.

        Raises:
            FedgroveError: the loss is not finite, or the noise is too little.
        """
        ...


METHOD = Trainer


def trainer_of(name: str) -> Trainer:
    """The trainer of that name."""
    return cast(Trainer, plugins.load(PACKAGE, name))
