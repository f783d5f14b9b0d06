"""After a cut, the linear that reads what was cut is solved for anew, so that it makes up for what is missing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedgrove.client.server_weights import GROWTH

RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)  # tried in this order


@dataclass(frozen=True)
class Repaired:
    """A linear without some of its inputs.

    Attributes:
        weight: (out, kept) float64.
        ridge: λ; None: the cut weight itself, because no λ was better on held-out windows.
        error: the squared error on held-out windows, as a fraction of that of the cut weight itself.
    """

    weight: Tensor
    ridge: float | None
    error: float


def repair(weight: Tensor, halves: tuple[Tensor, Tensor], kept: Tensor) -> Repaired:
    """The weight on the kept inputs that comes closest to the output of the full weight on all inputs.

    With W_K and W_C the columns that are kept and cut, and G = Σ x xᵀ, it is

        W' = W_K + W_C·G_CK·(G_KK + λ·mean(diag G_KK)·I)⁻¹,

    the least-squares solution, drawn to W_K by a ridge. GRAIL (arXiv 2602.23795) has W·G_K·(G_KK + …)⁻¹, whose ridge draws to
    zero; here a large λ means no repair. That is ours, and so is how λ is chosen: each half of the windows is solved for and
    measured on the other, from large λ to small for as long as the error falls. The result is that of both halves together.

    G adds up over clients, so the result is that of their pooled text. Do not trust it with much fewer tokens than inputs: the
    held-out error then says that little can be repaired.

    Args:
        weight: (out, in), any float dtype.
        halves: Σ x xᵀ of either half of the windows, (in, in) float64 each.
        kept: (kept,) the ascending indices of the inputs that stay.
    """
    weight = weight.double()
    own = weight[:, kept]
    is_cut = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_cut[kept] = False
    cut = weight[:, is_cut]
    problems = [_Problem.of(cut, gram, kept, is_cut) for gram in halves]
    total = sum(problem.error(torch.zeros_like(own)) for problem in problems)
    best, ridge = 1.0, None
    for candidate in RIDGES:
        found = [problem.solve(candidate) for problem in problems]
        if found[0] is None or found[1] is None or not total:
            break
        error = (problems[1].error(found[0]) + problems[0].error(found[1])) / total
        if error >= best:
            break
        best, ridge = error, candidate
    both = _Problem.of(cut, halves[0] + halves[1], kept, is_cut)
    limit = GROWTH * float(weight.norm())  # of what clients take from a server
    for candidate in reversed([one for one in RIDGES if ridge is not None and one >= ridge]):
        change = both.solve(candidate)
        if change is not None and float((own + change).norm()) <= limit:
            return Repaired(own + change, candidate, best)
    return Repaired(own, None, 1.0)


@dataclass(frozen=True)
class _Problem:
    """Least squares of W_C x_C by Δ x_K over some tokens.

    Attributes:
        gram: G_KK, (kept, kept).
        target: W_C·G_CK, (out, kept).
        size: Σ ‖W_C x_C‖².
    """

    gram: Tensor
    target: Tensor
    size: float

    @classmethod
    def of(cls, cut: Tensor, gram: Tensor, kept: Tensor, is_cut: Tensor) -> _Problem:
        rows = gram[is_cut]
        return cls(gram[kept][:, kept], cut @ rows[:, kept], float(((cut @ rows[:, is_cut]) * cut).sum()))

    def solve(self, ridge: float) -> Tensor | None:
        """Δ, (out, kept); None if the matrix cannot be factored."""
        damped = self.gram.clone()
        damped.diagonal().add_(ridge * damped.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(damped)
        return None if int(info) else torch.cholesky_solve(self.target.T, factor).T

    def error(self, change: Tensor) -> float:
        """Σ ‖W_C x_C − Δ x_K‖²."""
        return self.size + float(((change @ self.gram - 2 * self.target) * change).sum())


def shifted_bias(bias: Tensor, before: Tensor, after: Tensor, means: Tensor, kept: Tensor) -> Tensor:
    """The bias with which the mean output stays what it was: b + W·E[x] − W'·E[x_K] (FLAP, An et al., AAAI 2024).

    Args:
        bias: (out,).
        before: (out, in), the full weight W.
        after: (out, kept), the weight on the kept inputs W'.
        means: E[x], (in,) float64.
        kept: (kept,) the indices of the inputs that stay.

    Returns:
        (out,) float64.
    """
    return bias.double() + before.double() @ means - after.double() @ means[kept]
