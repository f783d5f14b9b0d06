"""Which linears are worth tuning: SVD-form adapters for a few steps, sensitivity × uncertainty of what moves in them.

The score is AdaLoRA's (Zhang et al., ICLR 2023, Eq. 8-11), as its reference code has it; that FedPipe (arXiv 2404.06448)
scores SVD-form adapters by sensitivity is the paper's, that it is this formula is our reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedgrove.stages.tune.factors import initial_a
from fedgrove.stages.tune.training import Settings, loss_sum, pieces

RANK = 4  # of the adapters that are only scored
BETA = 0.85  # AdaLoRA's β₁ and β₂


@dataclass
class Smoothed:
    """Sensitivity I and uncertainty U of every number of a tensor, smoothed over steps.

    ipt = |w · ∂L/∂w|;  I ← β·I + (1−β)·ipt;  U ← β·U + (1−β)·|ipt − I|, with the new I.
    """

    sensitivity: Tensor
    uncertainty: Tensor

    @classmethod
    def of(cls, like: Tensor) -> Smoothed:
        """Zeros."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def update(self, value: Tensor, gradient: Tensor) -> None:
        """One step."""
        now = (value * gradient).abs()
        self.sensitivity.mul_(BETA).add_(now, alpha=1 - BETA)
        self.uncertainty.mul_(BETA).add_((now - self.sensitivity).abs(), alpha=1 - BETA)

    def score(self) -> Tensor:
        """s = I · U, number by number."""
        return self.sensitivity * self.uncertainty


def triplet_scores(scales: Smoothed, left: Smoothed, right: Smoothed) -> Tensor:
    """(rank,): S_k = s(λ_k) + mean_j s(P_jk) + mean_j s(Q_kj), of ΔW = P·diag(λ)·Q."""
    return scales.score() + left.score().mean(0) + right.score().mean(1)


class _Adapter(nn.Module):
    """ΔW = P·diag(λ)·Q of a linear, λ = 0 at first: the model starts as it is."""

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
        model: frozen; it is left as it was.
        shapes: (out, in) of each linear that can be tuned.
        batches: of windows; see :func:`fedgrove.stages.tune.training.draw`.
        settings: of the steps; all start from λ = 0, so at least two are needed for P and Q to count.
        seed: draws P and Q, the same for all clients.

    Returns:
        (linears,) float64: the mean of a linear's triplet scores, in the order of ``shapes``. On a pruned model the adapters
        are not masked here: a score only says where to tune.
    """
    device = next(model.parameters()).device
    adapters = {name: _Adapter(*shape, name, seed, device) for name, shape in shapes.items()}
    handles = [model.get_submodule(name).register_forward_hook(_adding(adapter)) for name, adapter in adapters.items()]
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    smoothed = [Smoothed.of(parameter.detach()) for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    model.eval()
    try:
        with torch.enable_grad():
            for _ in range(settings.steps):
                ids, labels = next(batches)
                for part, wanted in pieces(ids, labels, settings.micro):
                    loss = loss_sum(model, part, wanted) / max(1, ids.numel())
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
    scores: Sequence[Tensor] = []
    for _ in adapters:
        left, scales, right = next(states), next(states), next(states)
        scores = [*scores, triplet_scores(scales, left, right).double().mean()]
    return torch.stack(list(scores)).cpu()


def _adding(adapter: _Adapter) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change: Tensor = adapter(args[0])
        return output + change.to(output.dtype)

    return hook


def shares(scores: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Scores to importance: the square root, so that a score that is a product of two sizes counts as one; together 1."""
    roots = scores.clamp_min(0).sqrt()
    total = float(roots.sum())
    if not total:
        return dict.fromkeys(names, 1 / len(names))
    return {name: float(root) / total for name, root in zip(names, roots, strict=True)}
