"""What moves along a direction: the weight of each linear, or the B of an adapter beside it.

Either way the steps of all directions are one sum of whole numbers for each tensor (:mod:`fedgrove.stages.tune.seeds.offsets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedgrove.models.blocks import as_matrix
from fedgrove.models.signs import chunks, direction_like, key_of, signs
from fedgrove.stages.tune.factors import Factors, initial_a
from fedgrove.stages.tune.seeds.offsets import UNIT, Offsets, moved


class Linear(NamedTuple):
    """A linear of the model, as it was before the stage.

    Attributes:
        name: in the model; of linears that share a weight, the first.
        stored: the weight's name in the checkpoint.
        module: whose class tells the layout of the weight.
        weight: in the checkpoint's layout.
    """

    name: str
    stored: str
    module: nn.Module
    weight: Tensor


class Moving(Protocol):
    """What moves."""

    @property
    def offsets(self) -> Offsets:
        """The sums of the steps so far."""
        ...

    def weight(self, linear: Linear, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight with all steps, in the checkpoint's layout, computed in float64 and rounded once."""
        ...

    def along(self, linear: Linear, direction: int) -> Tensor:
        """What one unit along a direction adds to the weight, in its layout, on its device."""
        ...

    def slopes(self, linear: Linear, gradient: Tensor, directions: Sequence[int]) -> Tensor:
        """The derivative along each direction, (directions,) float64, from the gradient of the weight, in its layout."""
        ...


@dataclass(frozen=True)
class Weights:
    """Every entry of the weight: a direction is a sign for each.

    Attributes:
        seed: of the stage.
    """

    offsets: Offsets
    seed: str

    def weight(self, linear: Linear, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        return moved(linear.weight, self.offsets.at(linear.stored, linear.weight.shape, coefficients), dtype)

    def along(self, linear: Linear, direction: int) -> Tensor:
        """int8."""
        return direction_like(key_of(self.seed, linear.stored), direction, linear.weight).to(linear.weight.device)

    def slopes(self, linear: Linear, gradient: Tensor, directions: Sequence[int]) -> Tensor:
        return _along_signs(gradient, key_of(self.seed, linear.stored), directions)


@dataclass(frozen=True)
class Adapters:
    """B of an adapter W + B·A: a direction is a sign for each entry of B, so a step has a low rank.

    A is random, the same for all clients, and never trained: at B = 0 its gradient is 0, so at first B alone loses nothing.

    Attributes:
        seed: of the stage.
        rank: of every adapter.
    """

    offsets: Offsets
    seed: str
    rank: int
    _a: dict[str, Tensor] = field(default_factory=dict)

    def factors(self, linear: Linear, coefficients: Tensor) -> Factors:
        """The adapter with all steps, float32."""
        offset = self.offsets.at(self._stored(linear), torch.Size(self._shape(linear)), coefficients)
        return Factors((offset.double() * UNIT).float(), self._a_of(linear))

    def weight(self, linear: Linear, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        factors = self.factors(linear, coefficients)
        product = as_matrix(linear.module, factors.b.double() @ factors.a.double()).to(linear.weight.device)
        return product.add_(linear.weight).to(dtype)  # in place: a large weight is not in memory three times in float64

    def along(self, linear: Linear, direction: int) -> Tensor:
        """float32."""
        b = direction_like(self._key(linear), direction, torch.empty(self._shape(linear), device="meta"))
        return as_matrix(linear.module, b.float() @ self._a_of(linear)).to(linear.weight.device)

    def slopes(self, linear: Linear, gradient: Tensor, directions: Sequence[int]) -> Tensor:
        of_b = as_matrix(linear.module, gradient) @ self._a_of(linear).T.to(gradient.device)
        return _along_signs(of_b.contiguous(), self._key(linear), directions)

    def _shape(self, linear: Linear) -> tuple[int, int]:
        return as_matrix(linear.module, linear.weight).shape[0], self.rank

    def _stored(self, linear: Linear) -> str:
        return f"{linear.stored}.b"

    def _key(self, linear: Linear) -> int:
        return key_of(self.seed, self._stored(linear))

    def _a_of(self, linear: Linear) -> Tensor:
        if linear.name not in self._a:
            columns = as_matrix(linear.module, linear.weight).shape[1]
            self._a[linear.name] = initial_a(linear.name, self.rank, columns, self.seed)
        return self._a[linear.name]


def moving_of(offsets: Offsets, seed: str, rank: int) -> Weights | Adapters:
    """What moves: adapters of this rank, or with rank 0 the weights."""
    return Adapters(offsets, seed, rank) if rank else Weights(offsets, seed)


def _along_signs(gradient: Tensor, key: int, directions: Sequence[int]) -> Tensor:
    """Σ gradient · sign for each direction, chunk by chunk: (directions,) float64."""
    found, flat = torch.zeros(len(directions), dtype=torch.float64), gradient.reshape(-1)
    for start, count in chunks(len(flat)):
        part = flat[start : start + count].float().cpu()
        for place, direction in enumerate(directions):
            found[place] += float(part @ signs(key, direction, start, count).float())
    return found
