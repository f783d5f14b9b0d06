"""DP-SGD on a client: clipped gradients of single windows, and noise on their sum (Abadi et al., CCS 2016)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedgrove.data import IGNORED
from fedgrove.errors import FedgroveError
from fedgrove.privacy.accounting import dp_sgd_keeps
from fedgrove.privacy.gaussian import GaussianMechanism, poisson_sample
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
    if not dp_sgd_keeps(noise, epsilon, delta, rate, rounds * settings.steps):
        raise FedgroveError(f"client '{client}': noise of {noise:g} is too little for epsilon = {epsilon:g}; it trains nothing")
    mechanism = GaussianMechanism(bound, noise, adders=1)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    anchors = [parameter.detach().clone() for parameter in parameters.values()] if settings.proximal else []
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    optimizer = make(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
    model.eval()
    with torch.enable_grad():
        for _ in range(settings.steps):
            sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
            for window in poisson_sample(len(ids), rate):
                for name, gradient in mechanism.clip(_gradient(model, parameters, ids[window], labels[window])).items():
                    sums[name] += gradient
            for name, total in mechanism.add_share(sums).items():
                parameters[name].grad = (total / (rate * len(ids))).to(parameters[name].dtype)
            if settings.proximal:
                for parameter, anchor in zip(parameters.values(), anchors, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - anchor, alpha=settings.proximal)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _gradient(model: nn.Module, parameters: Mapping[str, nn.Parameter], ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss of one window, ids and labels (length,), by parameter; without those that took no part."""
    learnt = int((labels[1:] != IGNORED).sum())
    loss = loss_sum(model, ids[None], labels[None]) / max(1, learnt)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
