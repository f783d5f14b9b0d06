"""What every trainer shares: the settings of a round, batches of windows, the loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedgrove.data.windows import IGNORED


@dataclass(frozen=True)
class Settings:
    """How a client trains in one round.

    Attributes:
        steps: optimizer steps.
        batch: windows of each step; micro: windows that a device computes at once (gradients are accumulated).
        optimizer: "adamw" (β 0.9 and 0.999, no weight decay) or "sgd"; its state begins anew in every round.
        learning_rate: of the optimizer.
        max_grad_norm: the largest norm of the gradient; 0 for any.
        proximal: FedProx's μ (Li et al., MLSys 2020): μ/2·‖θ − θ₀‖² is added to the loss.
    """

    steps: int
    batch: int
    micro: int
    learning_rate: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    max_grad_norm: float = 0.0
    proximal: float = 0.0


GradientMasks = Sequence[tuple[nn.Parameter, Tensor]]  # parameters whose gradient is zero where the mask is False


@dataclass(frozen=True)
class Budget:
    """Differential privacy of a client's windows: what all rounds together may spend.

    Attributes:
        epsilon, delta: of one window.
        noise: standard deviation of the noise on the sum of a step, in units of ``clip``; chosen by the server.
        rounds: how many there are.
        clip: the largest norm of a window's gradient.
    """

    epsilon: float
    delta: float
    noise: float
    rounds: int
    clip: float


@dataclass(frozen=True)
class Work:
    """What a trainer works on besides the model.

    Attributes:
        ids, labels: all windows of the client that it trains on, (windows, length); labels of ``IGNORED`` are not learnt.
        seen: windows that it was given in earlier rounds.
        seed: draws the batches.
        masks: parameters whose gradient is masked, so that a pruned model's zeros stay.
        devices: besides the model's own.
        budget: of trainers that add noise.
    """

    ids: Tensor
    labels: Tensor
    seen: int
    seed: str
    masks: GradientMasks = ()
    devices: Sequence[torch.device] = ()
    budget: Budget | None = None


def pieces(ids: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch, so many windows at a time."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size], labels[start : start + size]


def loss_sum(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """−Σ log p of the labelled tokens, each given those before it in its window; float32."""
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), use_cache=False).logits
    wanted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # the labels are moved, not the much larger logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), wanted.flatten().to(device), ignore_index=IGNORED, reduction="sum"
    )


def draw(ids: Tensor, labels: Tensor, batch: int, seen: int, seed: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: every window once an epoch, in an order that the seed and the epoch give.

    Args:
        ids, labels: all windows of a client.
        seen: how many windows it has been given before; it goes on there.
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
    """What requires a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """The clients' optimizer, with no weight decay; its state begins anew."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    return kinds[settings.optimizer](parameters, lr=settings.learning_rate, weight_decay=0.0)
