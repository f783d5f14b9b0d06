"""The importance of each linear for tuning: sensitivity × uncertainty of SVD-form adapters, trained for a few steps.

The score is AdaLoRA's (Zhang et al., ICLR 2023, Eq. 8-11), as in its reference code. FedPipe (arXiv 2404.06448) scores
SVD-form adapters by sensitivity; that it uses this formula is our reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedgrove.stages.tune.factors import initial_a
from fedgrove.stages.tune.training import Settings, loss_sum, pieces

RANK = 4  # of the adapters that are trained only for the score
BETA = 0.85  # AdaLoRA's β₁ and β₂


@dataclass
class Smoothed:
    """Sensitivity I and uncertainty U of every number w of a tensor, smoothed over steps.

    ipt = |w · ∂L/∂w|;  I ← β·I + (1−β)·ipt;  U ← β·U + (1−β)·|ipt − I|, with the new I.
    """

    sensitivity: Tensor
    uncertainty: Tensor

    @classmethod
    def of(cls, like: Tensor) -> Smoothed:
        """Zeros in the shape of a tensor."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def update(self, value: Tensor, gradient: Tensor) -> None:
        """Adds one step: the values of the tensor and their gradients."""
        ipt = (value * gradient).abs()
        self.sensitivity.mul_(BETA).add_(ipt, alpha=1 - BETA)
        self.uncertainty.mul_(BETA).add_((ipt - self.sensitivity).abs(), alpha=1 - BETA)

    def score(self) -> Tensor:
        """s = I · U, element by element."""
        return self.sensitivity * self.uncertainty


def triplet_scores(scales: Smoothed, left: Smoothed, right: Smoothed) -> Tensor:
    """S_k = s(λ_k) + mean_j s(P_jk) + mean_j s(Q_kj) for ΔW = P·diag(λ)·Q, (rank,)."""
    return scales.score() + left.score().mean(0) + right.score().mean(1)


class _Adapter(nn.Module):
    """ΔW = P·diag(λ)·Q of a linear; λ starts at 0, so that the model is unchanged at first."""

    def __init__(self, num_out: int, num_in: int, name: str, seed: str, device: torch.device):
        super().__init__()
        self.left = nn.Parameter(initial_a(f"{name}/P", RANK, num_out, seed).T.contiguous().to(device))
        self.scales = nn.Parameter(torch.zeros(RANK, device=device))
        self.right = nn.Parameter(initial_a(f"{name}/Q", RANK, num_in, seed).to(device))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = ((x.to(self.right.dtype) @ self.right.T) * self.scales) @ self.left.T
        return change


def importance(
    model: nn.Module,
    shapes: dict[str, tuple[int, int]],
    batches: Iterator[tuple[Tensor, Tensor]],
    settings: Settings,
    seed: str,
) -> Tensor:
    """Scores every linear on a client's text.

    Args:
        model: frozen; unchanged afterwards.
        shapes: (out, in) of each linear that can be tuned.
        batches: of windows; see :func:`fedgrove.stages.tune.training.draw`.
        settings: of the training; since λ starts at 0, P and Q only contribute from the second step on.
        seed: for the initial P and Q, the same for all clients.

    Returns:
        (linears,) float64: the mean of a linear's triplet scores, in the order of ``shapes``. On a pruned model the adapters
        are not masked here, because the score only decides where to tune.
    """
    device = next(model.parameters()).device
    adapters = {name: _Adapter(*shape, name, seed, device) for name, shape in shapes.items()}
    handles = [model.get_submodule(name).register_forward_hook(_add_output(adapter)) for name, adapter in adapters.items()]
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    smoothed = [Smoothed.of(parameter.detach()) for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    model.eval()
    try:
        with torch.enable_grad():
            for _ in range(settings.steps):
                ids, labels = next(batches)
                for part, part_labels in pieces(ids, labels, settings.micro):
                    loss = loss_sum(model, part, part_labels) / max(1, ids.numel())
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                for parameter, state in zip(parameters, smoothed, strict=True):
                    assert parameter.grad is not None
                    state.update(parameter.detach(), parameter.grad)
                optimizer.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    states = iter(smoothed)
    scores: list[Tensor] = []
    for _ in adapters:
        left, scales, right = next(states), next(states), next(states)
        scores.append(triplet_scores(scales, left, right).double().mean())
    return torch.stack(scores).cpu()


def _add_output(adapter: _Adapter) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change: Tensor = adapter(args[0])
        return output + change.to(output.dtype)

    return hook


def normalized(scores: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Converts scores to importances that add up to 1, via the square root, since a score is a product of two magnitudes."""
    roots = scores.clamp_min(0).sqrt()
    total = float(roots.sum())
    if not total:
        return dict.fromkeys(names, 1 / len(names))
    return {name: float(root) / total for name, root in zip(names, roots, strict=True)}
