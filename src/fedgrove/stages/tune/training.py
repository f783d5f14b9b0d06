"""What every trainer shares: the settings of a round, batches of windows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedgrove.errors import FedgroveError
from fedgrove.privacy.accounting import dp_sgd_keeps, noise_of_part


@dataclass(frozen=True)
class Settings:
    """How a client trains in one round.

    Attributes:
        steps: optimizer steps.
        batch: windows of each step.
        micro: windows that a device computes at once; gradients are accumulated.
        learning_rate: of the optimizer.
        optimizer: "adamw" (β 0.9 and 0.999, no weight decay) or "sgd"; its state is reset in every round.
        max_grad_norm: the gradient is clipped to this L2 norm; 0: no clipping.
        proximal: FedProx's μ (Li et al., MLSys 2020): μ/2·‖θ − θ₀‖² is added to the loss.
    """

    steps: int
    batch: int
    micro: int
    learning_rate: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    max_grad_norm: float = 0.0
    proximal: float = 0.0


class NotFinite(FedgroveError):
    """The loss of a client's text is not finite."""


GradientMasks = Sequence[tuple[nn.Parameter, Tensor]]  # parameters whose gradient is zero where the mask is False


@dataclass(frozen=True)
class Budget:
    """The privacy budget of DP-SGD for all rounds together.

    Attributes:
        epsilon, delta: the guarantee for each window.
        noise: standard deviation of the noise on a step's sum of gradients, in units of ``clip``; chosen by the server.
        rounds: number of rounds that the budget is for.
        clip: the largest L2 norm of a window's gradient; larger ones are scaled down.
        gate: whether the fit of a pool's gate gets a part of the budget.
    """

    epsilon: float
    delta: float
    noise: float
    rounds: int
    clip: float
    gate: bool = False

    def keeps(self, rate: float, steps: int) -> bool:
        """Whether the noise is enough.

        Args:
            rate: the probability that a window takes part in a step.
            steps: of a round.
        """
        besides = noise_of_part(self.epsilon, self.delta) if self.gate else None
        return dp_sgd_keeps(self.noise, self.epsilon, self.delta, rate, self.rounds * steps, besides)


@dataclass(frozen=True)
class Work:
    """The inputs of a trainer besides the model and the settings.

    Attributes:
        ids, labels: all windows to train on, (windows, length); tokens with label ``IGNORED`` have no loss.
        seen: how many windows the client trained on in earlier rounds.
        seed: determines the order of the windows.
        masks: parameters whose gradient is masked, so that the zeros of a pruned model stay.
        devices: further devices, besides the one that has the model.
        budget: for trainers that add noise; else None.
        penalty: is added to the loss of every step, a function of what is trained; trainers with noise have none.
    """

    ids: Tensor
    labels: Tensor
    seen: int
    seed: str
    masks: GradientMasks = ()
    devices: Sequence[torch.device] = ()
    budget: Budget | None = None
    penalty: Callable[[], Tensor] | None = None


def pieces(ids: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Splits a batch into parts of at most ``size`` windows."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size], labels[start : start + size]


def draw(ids: Tensor, labels: Tensor, batch: int, seen: int, seed: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Infinitely many batches: every window once per epoch, in an order that depends on the seed and the epoch.

    Args:
        ids, labels: all windows of a client.
        batch: windows of each batch.
        seen: how many windows were drawn in earlier rounds; drawing continues after them.
    """
    order: list[int] = []
    epoch = -1
    while True:
        picked = []
        for _ in range(batch):
            if epoch != seen // len(ids):
                epoch = seen // len(ids)
                order = list(range(len(ids)))
                random.Random(f"{seed}/{epoch}").shuffle(order)
            picked.append(order[seen % len(ids)])
            seen += 1
        yield ids[picked], labels[picked]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """A new optimizer without weight decay."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    return kinds[settings.optimizer](parameters, lr=settings.learning_rate, weight_decay=0.0)
