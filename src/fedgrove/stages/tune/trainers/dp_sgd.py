"""DP-SGD on a client: clipped gradients of single windows, and noise on their sum (Abadi et al., CCS 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedgrove.data import IGNORED
from fedgrove.errors import FedgroveError
from fedgrove.privacy.tuning import enough, gaussian, picked
from fedgrove.stages.tune.lora import Settings, loss_sum


def train(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor,
    settings: Settings,
    *,
    client: str,
    epsilon: float,
    delta: float,
    noise: float,
    rounds: int,
    bound: float,
) -> None:
    """Trains what requires a gradient, so that no window of the text can be told from what was learnt.

    In every step each window takes part with probability ``settings.batch`` / windows, by the operating system's randomness:
    who knew the draw would gain what is counted as hidden by it. Windows go through the model one by one; the gradient of a
    window's mean loss is scaled down to the norm ``bound`` over all trained parameters (and to nothing where it is not
    finite), the sum gets Gaussian noise and is divided by the expected number of windows. What the optimizer makes of that
    gradient spends nothing more.

    Args:
        model: in any state; it is left in that of evaluation.
        ids, labels: all windows of the client.
        settings: ``batch`` is the expected number of windows of a step; ``max_grad_norm`` and ``micro`` are not looked at.
        client: for the message of an error.
        epsilon, delta: what all rounds together may spend.
        noise: standard deviation of the noise on the sum, in units of ``bound``; chosen by the server, checked here.
        rounds: how many there are, of ``settings.steps`` each.

    Raises:
        FedgroveError: the noise is too little for what was promised.
    """
    rate = min(1.0, settings.batch / len(ids))
    if not enough(noise, epsilon, delta, rate, rounds * settings.steps):
        raise FedgroveError(f"client '{client}': noise of {noise:g} is too little for epsilon = {epsilon:g}; it trains nothing")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    anchors = [parameter.detach().clone() for parameter in parameters] if settings.proximal else []
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    optimizer = make(parameters, lr=settings.learning_rate, weight_decay=0.0)
    model.eval()
    with torch.enable_grad():
        for _ in range(settings.steps):
            sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
            for window in picked(len(ids), rate):
                for total, gradient in zip(sums, _gradient(model, parameters, ids[window], labels[window], bound), strict=True):
                    total += gradient
            for parameter, total in zip(parameters, sums, strict=True):
                drawn = gaussian(total.numel(), noise * bound).view(total.shape).to(total.device)
                parameter.grad = ((total + drawn) / (rate * len(ids))).to(parameter.dtype)
            if settings.proximal:
                for parameter, anchor in zip(parameters, anchors, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - anchor, alpha=settings.proximal)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _gradient(model: nn.Module, parameters: list[nn.Parameter], ids: Tensor, labels: Tensor, bound: float) -> list[Tensor]:
    """Of the mean loss of one window, (length,) each, no longer than ``bound``."""
    learnt = int((labels[1:] != IGNORED).sum())
    loss = loss_sum(model, ids[None], labels[None]) / max(1, learnt)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in found))
    if not math.isfinite(norm):
        return [torch.zeros_like(gradient) for gradient in found]
    scale = min(1.0, bound * (1 - 1e-6) / max(norm, 1e-300))  # less than the rounding of float32 could add
    return [gradient * scale for gradient in found]
