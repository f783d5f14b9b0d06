"""The Gaussian mechanism: contributions clipped to an L2 norm, and Gaussian noise on their sum.

Everything here that promises differential privacy clips with :func:`clip` and adds the noise of :func:`gaussian_noise`, through
a :class:`GaussianMechanism` that both sides build from the same public numbers:

- Wanda's statistics: a window's Σ x² is clipped, each client adds its share of the noise to its sums.
- Tuning, one client protected: a client's whole change is clipped; each client adds its share of the noise under secure
  aggregation, or the server adds all of it to a sum in the open.
- Tuning, one window protected (DP-SGD): a window's gradient is clipped, the client adds all of the noise in each step.

How much noise a promise needs is in :mod:`fedgrove.privacy.accounting`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
from torch import Tensor

_Tensors = TypeVar("_Tensors", Tensor, dict[str, Tensor])


@dataclass(frozen=True)
class GaussianMechanism:
    """What is clipped, how much noise the sum gets, and who adds it. The client half and the server half agree on it.

    A protected unit (a window, a client) is clipped to ``clip_norm``, multiplied by ``weight``, perhaps rounded to fixed point,
    and added to a sum. The sum gets noise of standard deviation ``noise_multiplier`` · :meth:`sensitivity`.

    Attributes:
        clip_norm: largest L2 norm of one unit, over all of its tensors together.
        noise_multiplier: standard deviation of the noise in units of the sensitivity; see :mod:`fedgrove.privacy.accounting`.
        adders: how many clients, at least, are in every sum that is opened: each adds noise of 1/√adders of that standard
            deviation. 1: the client adds all of it; 0: the server does.
        weight: what a unit is multiplied with in the sum.
        bits: fractional bits of fixed-point sums: an integer n stands for n · 2^−bits. 0 for floats.
        rounding: the largest error, in units of 2^−bits, by which rounding can lengthen a number: 0.5 where clipped units are
            rounded to the nearest, 0 where they are rounded towards zero or not at all.
    """

    clip_norm: float
    noise_multiplier: float
    adders: int
    weight: float = 1.0
    bits: int = 0
    rounding: float = 0.0

    @overload
    def clip(self, unit: Tensor) -> Tensor: ...
    @overload
    def clip(self, unit: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def clip(self, unit: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """The client's half: one unit, scaled down to ``clip_norm`` where it is longer; see :func:`clip`."""
        return clip(unit, self.clip_norm)

    def add_share(self, sums: _Tensors) -> _Tensors:
        """The client's half: a client's sums with its share of the noise; unchanged if the server adds it.

        Args:
            sums: one tensor, or all tensors of a unit by name: floats, or integers with ``bits`` fractional bits, which get
                noise rounded to integers. Integers must have room for it.

        Returns:
            Likewise, same dtypes and devices.
        """
        return self._noisy(sums, 1 / math.sqrt(self.adders)) if self.adders else sums

    def add_at_server(self, totals: _Tensors) -> _Tensors:
        """The server's half: the clients' sum with all of the noise; unchanged if the clients added it.

        Args:
            totals: as for :meth:`add_share`.
        """
        return totals if self.adders else self._noisy(totals, 1.0)

    def sensitivity(self, numel: int) -> float:
        """How far one unit of so many numbers can move the sum in L2 norm, in units of the values."""
        return self.clip_norm * self.weight + self.rounding * math.sqrt(numel) * 2.0**-self.bits

    def _noisy(self, sums: _Tensors, fraction: float) -> _Tensors:
        tensors = {"": sums} if isinstance(sums, Tensor) else sums
        numel = sum(tensor.numel() for tensor in tensors.values())
        sigma = self.noise_multiplier * self.sensitivity(numel) * fraction * 2.0**self.bits
        noisy = {}
        for name, tensor in tensors.items():
            noise = gaussian_noise(tensor.shape, sigma).to(tensor.device)
            if tensor.is_floating_point():
                noisy[name] = tensor + noise.to(tensor.dtype)
            else:
                noisy[name] = (tensor.long() + noise.round().long()).to(tensor.dtype)
        return noisy[""] if isinstance(sums, Tensor) else noisy


@overload
def clip(unit: Tensor, norm: float) -> Tensor: ...
@overload
def clip(unit: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]: ...
def clip(unit: Tensor | Mapping[str, Tensor], norm: float) -> Tensor | dict[str, Tensor]:
    """Scales a tensor, or several as if they were one, down to an L2 norm of at most ``norm``; nothing is scaled up.

    Returns:
        float64, each on its device; all zeros if a number is not finite.
    """
    if isinstance(unit, Tensor):
        return clip({"": unit}, norm)[""]
    length = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in unit.values()))
    if not math.isfinite(length):
        return {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in unit.items()}
    scale = min(1.0, norm * (1 - 1e-9) / max(length, 1e-300))  # the rounding of float64 may not lengthen it past the norm
    return {name: tensor.double() * scale for name, tensor in unit.items()}


def gaussian_noise(shape: Sequence[int], sigma: float) -> Tensor:
    """Gaussian noise of standard deviation ``sigma`` from the operating system's randomness, by Box and Muller's formula.

    The uniform numbers have 53 bits, so nothing beyond 8.6 σ is drawn, which has a probability of 10⁻¹⁷.

    Returns:
        Of that shape, float64, on the CPU.
    """
    numel = math.prod(shape)
    half = (numel + 1) // 2
    radius, angle = torch.sqrt(-2 * torch.log(_uniform(half))), 2 * math.pi * _uniform(half)
    return (torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:numel] * sigma).view(*shape)


def poisson_sample(number: int, rate: float) -> list[int]:
    """Which of so many windows take part in a step: each with probability ``rate``, by the operating system's randomness."""
    return torch.nonzero(_uniform(number) <= rate).flatten().tolist()


def _uniform(number: int) -> Tensor:
    """(number,) float64 in (0, 1]."""
    if not number:
        return torch.zeros(0, dtype=torch.float64)
    raw = torch.frombuffer(bytearray(os.urandom(8 * number)), dtype=torch.int64)
    return ((raw & (2**53 - 1)) + 1).double() * 2.0**-53
