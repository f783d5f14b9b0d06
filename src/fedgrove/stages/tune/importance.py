"""What a client measures before a planner chooses: the importance of each linear, and the shape of its gradient.

The importance is the sensitivity × uncertainty of SVD-form adapters, trained for a few steps: AdaLoRA's score (Zhang et al.,
ICLR 2023, Eq. 8-11), as in its reference code. FedPipe (arXiv 2404.06448) scores SVD-form adapters by sensitivity; that it
uses this formula is our reconstruction. The same steps give, without further passes, how much the gradients of single windows
agree (McCandlish et al., arXiv 1812.06162) and how much of each linear's gradient a few directions hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedgrove.models.next_tokens import loss_sum
from fedgrove.stages.tune.factors import initial_a
from fedgrove.stages.tune.training import Settings, pieces

RANK = 4  # of the adapters that are trained only for the score
SKETCH = 16  # directions in which a linear's gradient is seen; what a higher rank would keep is not told apart
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


@dataclass(frozen=True)
class Measured:
    """What a client measured; all float64, on the CPU.

    Attributes:
        scores: (linears,), the importance of each linear, not negative.
        kept: (linears, ranks), the fraction of the squared gradient of each linear that each rank can hold, 0 to 1.
        coherence: (1,), see :func:`coherence`.
    """

    scores: Tensor
    kept: Tensor
    coherence: Tensor


def coherence(squares: float, square_of_sum: float, number: int) -> float:
    """|G|² / (|G|² + tr Σ) of gradients with mean G and covariance Σ: 1 if all windows' gradients agree, 0 if they are noise.

    McCandlish et al., arXiv 1812.06162, appendix A.1, with batches of one window and of all: the mean of |g|² estimates
    |G|² + tr Σ, and |mean of g|² estimates |G|² + tr Σ / number; both without bias. The noise scale tr Σ / |G|² is
    1/coherence − 1. Sent in place of the two squares because it is bounded, whatever the model and the text.

    Args:
        squares: Σ |g|² over windows.
        square_of_sum: |Σ g|².
        number: of windows, at least 2.

    Returns:
        −1/(number − 1) to 1; 0 if all gradients are 0.
    """
    if not squares:
        return 0.0
    return (square_of_sum / squares - 1) / (number - 1)


def kept_by_ranks(sketch: Tensor, ranks: Sequence[int]) -> Tensor:
    """The fraction of the squared norm of a sketch G·Ω (out, directions) that its best approximation of each rank holds.

    The sum of the largest squared singular values over that of all. With few directions it is too large, most of all near their
    number; windows' noise, which has no few directions, makes it smaller.

    Returns:
        (ranks,) float64, 0 to 1; all 1 for a sketch of zeros.
    """
    squares = torch.linalg.eigvalsh((sketch.T @ sketch).double().cpu()).flip(0).clamp_min(0)
    total = squares.sum()
    if not total:
        return torch.ones(len(ranks), dtype=torch.float64)
    sums = (squares.cumsum(0) / total).clamp(max=1.0)
    return torch.stack([sums[min(rank, len(sums)) - 1] for rank in ranks])


class _Adapter(nn.Module):
    """ΔW = P·diag(λ)·Q of a linear; λ starts at 0, so that the model is unchanged at first.

    Besides, B·Ω with B = 0 and a fixed random Ω: it is never trained, and B's gradient is the sketch G·Ωᵀ of the weight's.
    """

    def __init__(self, num_out: int, num_in: int, name: str, seed: str, device: torch.device, directions: int):
        super().__init__()
        size = min(directions, num_out, num_in)
        self.sketch = nn.Parameter(torch.zeros(num_out, size, device=device))
        self.register_buffer("directions", initial_a(f"{name}/directions", size, num_in, seed).to(device))
        self.left = nn.Parameter(initial_a(f"{name}/P", RANK, num_out, seed).T.contiguous().to(device))
        self.scales = nn.Parameter(torch.zeros(RANK, device=device))
        self.right = nn.Parameter(initial_a(f"{name}/Q", RANK, num_in, seed).to(device))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.right.dtype)
        change: Tensor = ((x @ self.right.T) * self.scales) @ self.left.T
        sketched: Tensor = (x @ self.get_buffer("directions").T) @ self.sketch.T
        return change + sketched

    def trained(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """P, λ and Q."""
        return self.left, self.scales, self.right


def measure(
    model: nn.Module,
    shapes: dict[str, tuple[int, int]],
    batches: Iterator[tuple[Tensor, Tensor]],
    settings: Settings,
    seed: str,
    ranks: Sequence[int],
) -> Measured:
    """Scores every linear on a client's text, and measures its gradient.

    Args:
        model: frozen; unchanged afterwards.
        shapes: (out, in) of each linear that can be tuned.
        batches: of windows; see :func:`fedgrove.stages.tune.training.draw`. They are computed one window at a time.
        settings: of the training; since λ starts at 0, P and Q only contribute from the second step on.
        seed: for the initial P and Q, the same for all clients.
        ranks: those of which ``kept`` is measured.

    Returns:
        In the order of ``shapes``. A linear's score is the mean of its triplets' scores. On a pruned model the adapters
        are not masked here, because the score only decides where to tune. The gradients that are compared are those of all λ:
        each is P·G·Q, a random projection of G, and random projections keep the ratio of squared norms (Johnson and
        Lindenstrauss). They come from all steps, so what the few steps change of G counts as noise. ``coherence`` is 0
        for a single window.
    """
    device = next(model.parameters()).device
    size = min(SKETCH, max(ranks))
    adapters = {name: _Adapter(*shape, name, seed, device, size) for name, shape in shapes.items()}
    handles = [model.get_submodule(name).register_forward_hook(_add_output(adapter)) for name, adapter in adapters.items()]
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.trained()]
    scales = [adapter.scales for adapter in adapters.values()]
    smoothed = [Smoothed.of(parameter.detach()) for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    total, squares, number = torch.zeros(RANK * len(scales), dtype=torch.float64), 0.0, 0
    model.eval()
    try:
        with torch.enable_grad():
            for _ in range(settings.steps):
                ids, labels = next(batches)
                before = torch.zeros_like(total)
                for part, part_labels in pieces(ids, labels, 1):
                    loss = loss_sum(model, part, part_labels) / max(1, ids.numel())
                    loss.backward()  # type: ignore[no-untyped-call]
                    so_far = torch.cat([_gradient(parameter) for parameter in scales]).double().cpu()
                    gradient, before = (so_far - before) * len(ids), so_far
                    total, squares, number = total + gradient, squares + float(gradient.square().sum()), number + 1
                optimizer.step()
                for parameter, state in zip(parameters, smoothed, strict=True):
                    state.update(parameter.detach(), _gradient(parameter))
                optimizer.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    states = iter(smoothed)
    scores: list[Tensor] = []
    for _ in adapters:
        left, of_scales, right = next(states), next(states), next(states)
        scores.append(triplet_scores(of_scales, left, right).double().mean())
    kept = [kept_by_ranks(_gradient(adapter.sketch), ranks) for adapter in adapters.values()]
    agree = coherence(squares, float(total.square().sum()), number) if number > 1 else 0.0
    return Measured(torch.stack(scores).cpu(), torch.stack(kept), torch.tensor([agree], dtype=torch.float64))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient; zeros for an expert that no token reached."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


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
