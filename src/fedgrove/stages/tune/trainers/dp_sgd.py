"""DP-SGD on a client: clipped gradients of single windows, and noise on their sum (Abadi et al., CCS 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedgrove.data.windows import IGNORED
from fedgrove.errors import FedgroveError
from fedgrove.models.next_tokens import loss_sum
from fedgrove.privacy.gaussian import GaussianMechanism, poisson_sample
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.training import Settings, Work, make_optimizer, trained_parameters

PRIVATE = True
WITHOUT_GRADIENTS = False
FALLBACK: str | None = None
TAKES: frozenset[Form] = frozenset({"factors", "tensors"})


def train(model: nn.Module, work: Work, settings: Settings) -> None:
    """Trains the parameters that require a gradient, with differential privacy for each window of text.

    In every step each window takes part with probability ``settings.batch`` / windows (Poisson sampling), drawn from
    the operating system's randomness: the accounting assumes that nobody else knows the draw. Windows go through the
    model one by one. The gradient of a window's mean loss is scaled down to the L2 norm ``budget.clip`` over all
    trained parameters (to 0 if it is not finite). The sum of the gradients gets Gaussian noise and is divided by the
    expected number of windows. The optimizer and the masks only post-process this noisy gradient, which spends no
    budget.

    Args:
        model: in training or evaluation mode; it is left in evaluation mode.
        work: all windows of the client, the masks and the budget; ``seen``, ``seed`` and ``devices`` are ignored.
        settings: ``batch`` is the expected number of windows of a step; ``max_grad_norm`` and ``micro`` are ignored.

    Raises:
        FedgroveError: the noise is too small for the budget.
    """
    budget, ids, labels = work.budget, work.ids, work.labels
    assert budget is not None
    rate = min(1.0, settings.batch / len(ids))
    if not budget.keeps(rate, settings.steps):
        raise FedgroveError(f"noise of {budget.noise:g} is too little for epsilon = {budget.epsilon:g}; training refused")
    mechanism = GaussianMechanism(budget.clip, budget.noise, adders=1)
    parameters = trained_parameters(model)
    anchors = [parameter.detach().clone() for parameter in parameters] if settings.proximal else []
    optimizer = make_optimizer(parameters, settings)
    model.eval()
    with torch.enable_grad():
        for _ in range(settings.steps):
            sums = {str(i): torch.zeros_like(parameter, dtype=torch.float64) for i, parameter in enumerate(parameters)}
            for window in poisson_sample(len(ids), rate):
                for name, gradient in mechanism.clip(_gradient(model, parameters, ids[window], labels[window])).items():
                    sums[name] += gradient
            noisy = mechanism.add_share(sums)
            for i, parameter in enumerate(parameters):
                parameter.grad = (noisy[str(i)] / (rate * len(ids))).to(parameter.dtype)
            for weight, mask in work.masks:
                assert weight.grad is not None
                weight.grad.mul_(mask)
            if settings.proximal:
                for parameter, anchor in zip(parameters, anchors, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - anchor, alpha=settings.proximal)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _gradient(model: nn.Module, parameters: list[nn.Parameter], ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss of one window, ids and labels (length,), by index of the parameter."""
    learnt = int((labels[1:] != IGNORED).sum())
    loss = loss_sum(model, ids[None], labels[None]) / max(1, learnt)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {str(i): torch.zeros_like(p) if g is None else g for i, (g, p) in enumerate(zip(gradients, parameters, strict=True))}
