"""Low-rank changes of a weight, stored as two factors and never as the dense product."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The change B·A of a weight (out, in).

    Every scale (LoRA's α/r) is multiplied into B, so that clients with different scales can be added.

    Attributes:
        b: (out, rank).
        a: (rank, in).
    """

    b: Tensor
    a: Tensor

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Factors:
        """From its tensors ``b`` and ``a``."""
        return cls(parts["b"], parts["a"])

    def parts(self) -> dict[str, Tensor]:
        """``b`` and ``a``; empty if the rank is 0."""
        return {"b": self.b, "a": self.a} if self.rank else {}

    def numel(self) -> int:
        """Number of entries of the product."""
        return self.b.shape[0] * self.a.shape[1]

    @classmethod
    def none(cls, num_out: int, num_in: int) -> Factors:
        """No change: rank 0, float64."""
        return cls(torch.zeros(num_out, 0, dtype=torch.float64), torch.zeros(0, num_in, dtype=torch.float64))

    @property
    def rank(self) -> int:
        """The number of columns of B; the product may have a lower rank."""
        return self.b.shape[1]

    def product(self) -> Tensor:
        """B·A, dense (out, in)."""
        return self.b @ self.a

    def part(self, start: int, end: int) -> Factors:
        """The rank-one terms from ``start`` to ``end``."""
        return Factors(self.b[:, start:end], self.a[start:end])

    def scaled(self, scale: float) -> Factors:
        """scale · B·A."""
        return Factors(self.b * scale, self.a)

    def plus(self, *others: Factors) -> Factors:
        """The sum of the products: the factors concatenated."""
        all_ = (self, *others)
        return Factors(torch.cat([f.b for f in all_], 1), torch.cat([f.a for f in all_]))

    def double(self) -> Factors:
        """In float64."""
        return Factors(self.b.double(), self.a.double())

    def norm(self) -> float:
        """‖B·A‖_F, from the (rank, rank) Gram matrices."""
        return math.sqrt(max(0.0, float(self.squared_norm())))

    def largest_norm(self) -> float:
        """‖B‖_F·‖A‖_F ≥ ‖B·A‖_F. The Gram matrices of :meth:`norm` lose a small product of large factors that cancel."""
        return float(self.b.double().norm() * self.a.double().norm())

    def squared_norm(self) -> Tensor:
        """‖B·A‖²_F, float64 and differentiable; rounding can make it slightly negative."""
        b, a = self.b.double(), self.a.double()
        return ((b.T @ b) * (a @ a.T)).sum()

    def compress(self, rank: int | None = None) -> Factors:
        """The same product, or its best approximation of at most ``rank``; terms in descending order, √S in both factors.

        QR of both factors, then the SVD of the small core R_B·R_Aᵀ: this is the truncated SVD of the product (Eckart–Young)
        without forming it. Splitting S as √S·√S keeps the gradients of both factors at the same size, unlike S in one factor.
        The sign of each term is fixed, so that the result does not depend on the library's choice.

        Args:
            rank: the number of terms to keep; None keeps all that are not rounding noise.
        """
        q_b, r_b = torch.linalg.qr(self.b.double())
        q_a, r_a = torch.linalg.qr(self.a.double().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        noise = float(s[0]) * 1e-12 if s.numel() else 0.0
        num_terms = int((s > noise).sum())
        num_terms = num_terms if rank is None else min(num_terms, rank)
        b, a, root = q_b @ u[:, :num_terms], v[:num_terms] @ q_a.T, s[:num_terms].sqrt()
        if num_terms:
            sign = b.gather(0, b.abs().argmax(0, keepdim=True))[0].sign()
            b, a = b * sign, a * sign[:, None]
        return Factors(b * root, a * root[:, None])


def initial_a(name: str, rank: int, num_in: int, seed: str) -> Tensor:
    """The initial A of an adapter, (rank, in) float32, the same on every machine; B starts at 0.

    Uniform in ±1/√in, as in LoRA's reference code and peft. Rows do not depend on ``rank``, so clients with different ranks
    share their first rows.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rows = [torch.rand(num_in, generator=generator) for _ in range(rank)]
    bound = 1 / math.sqrt(num_in)
    return (torch.stack(rows) * 2 - 1) * bound if rows else torch.zeros(0, num_in)


def fill(factors: Factors, rank: int, name: str, seed: str) -> Factors:
    """An adapter of exactly ``rank`` terms: those of ``factors``, then new ones with B = 0, which change nothing yet."""
    if factors.rank >= rank:
        return factors.part(0, rank)
    new_a = initial_a(name, rank, factors.a.shape[1], seed)[factors.rank :].to(factors.a.dtype)
    new_b = factors.b.new_zeros(factors.b.shape[0], rank - factors.rank)
    return factors.plus(Factors(new_b, new_a))


class ProductSum:
    """Σ weight·B·A over clients, exactly, as factors.

    The sum has at most rank min(out, in), so whenever the concatenated factors exceed twice that, they are compressed without
    loss: memory does not grow with the number of clients.
    """

    def __init__(self, num_out: int, num_in: int):
        self.value = Factors.none(num_out, num_in)
        self.weight = 0.0

    def add(self, factors: Factors, weight: float) -> None:
        """Adds one client."""
        self.weight += weight
        self.value = self.value.plus(factors.double().scaled(weight))
        if self.value.rank > 2 * min(self.value.b.shape[0], self.value.a.shape[1]):
            self.value = self.value.compress()

    def mean(self) -> Factors:
        """Σ weight·B·A / Σ weight."""
        return self.value.scaled(1 / self.weight)
