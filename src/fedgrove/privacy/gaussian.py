"""The Gaussian mechanism: contributions are clipped to an L2 norm, and Gaussian noise is added to their sum.

All of fedgrove's differential privacy clips with :func:`clip` and adds noise from :func:`gaussian_noise`, through a
:class:`GaussianMechanism` that client and server build from the same public numbers:

- Wanda's statistics: a window's Σ x² is clipped; each client adds its share of the noise to its sums.
- Tuning, the protected unit is a client: a client's change, as one vector, is clipped. Under secure aggregation each
  client adds its share of the noise; without it the server adds all of the noise to the sum.
- Tuning, the protected unit is a window (DP-SGD): a window's gradient is clipped; the client adds all of the noise in
  each step.

:mod:`fedgrove.privacy.accounting` computes how much noise is needed.
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
    """The clipping norm, the noise of the sum, and who adds it. Client and server use the same mechanism.

    A protected unit (a window or a client) is clipped to ``clip_norm``, multiplied by ``weight``, optionally rounded to
    fixed point, and added to a sum. The sum gets noise of standard deviation ``noise_multiplier`` ·
    :meth:`sensitivity`.

    Attributes:
        clip_norm: largest L2 norm of one unit, over all of its tensors together.
        noise_multiplier: standard deviation of the noise in units of the sensitivity; see :mod:`fedgrove.privacy.accounting`.
        adders: the smallest number of clients in any opened sum: each adds noise of 1/√adders of that standard
            deviation. 1: the client adds all of the noise; 0: the server does.
        weight: the factor of a unit in the sum.
        bits: fractional bits of fixed-point sums: an integer n stands for n · 2^−bits. 0 for floats.
        rounding: the largest amount, in units of 2^−bits, by which rounding can increase the magnitude of a number: 0.5
            if clipped units are rounded to the nearest, 0 if they are rounded towards zero or not at all.
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
        """On the client: one unit, scaled down to ``clip_norm`` if its norm is larger; see :func:`clip`."""
        return clip(unit, self.clip_norm)

    def add_share(self, sums: _Tensors) -> _Tensors:
        """On the client: its sums plus its share of the noise; unchanged if the server adds the noise.

        Args:
            sums: one tensor, or all tensors of a unit by name: floats, or integers with ``bits`` fractional bits, to
                which noise rounded to integers is added. The integer dtype must be wide enough for the sum with noise.

        Returns:
            One tensor or tensors by name, as given, with the same dtypes and devices.
        """
        return self._noisy(sums, 1 / math.sqrt(self.adders)) if self.adders else sums

    def add_at_server(self, totals: _Tensors) -> _Tensors:
        """On the server: the clients' sum plus all of the noise; unchanged if the clients added the noise.

        Args:
            totals: as for :meth:`add_share`.
        """
        return totals if self.adders else self._noisy(totals, 1.0)

    def sensitivity(self, numel: int) -> float:
        """The largest change of the sum, in L2 norm and in units of the values, by one unit of ``numel`` numbers."""
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
    """Scales a tensor, or several tensors as one vector, down to an L2 norm of at most ``norm``; never scales up.

    Returns:
        float64 tensors, each on its device; all zeros if any number is not finite.
    """
    if isinstance(unit, Tensor):
        return clip({"": unit}, norm)[""]
    length = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in unit.values()))
    if not math.isfinite(length):
        return {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in unit.items()}
    scale = min(1.0, norm * (1 - 1e-9) / max(length, 1e-300))  # so that float64's rounding cannot exceed the norm
    return {name: tensor.double() * scale for name, tensor in unit.items()}


def gaussian_noise(shape: Sequence[int], sigma: float) -> Tensor:
    """Gaussian noise of standard deviation ``sigma`` from the operating system's randomness, by Box and Muller's formula.

    The uniform numbers have 53 bits, so no sample is beyond 8.6 σ; for exact Gaussians the probability of that is
    10⁻¹⁷.

    Returns:
        A float64 tensor of that shape, on the CPU.
    """
    numel = math.prod(shape)
    half = (numel + 1) // 2
    radius, angle = torch.sqrt(-2 * torch.log(_uniform(half))), 2 * math.pi * _uniform(half)
    return (torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:numel] * sigma).view(*shape)


def poisson_sample(number: int, rate: float) -> list[int]:
    """Indices of the windows in a step: each of ``number``, with probability ``rate``, by the system's randomness."""
    return torch.nonzero(_uniform(number) <= rate).flatten().tolist()


def _uniform(number: int) -> Tensor:
    """(number,) float64 in (0, 1]."""
    if not number:
        return torch.zeros(0, dtype=torch.float64)
    raw = torch.frombuffer(bytearray(os.urandom(8 * number)), dtype=torch.int64)
    return ((raw & (2**53 - 1)) + 1).double() * 2.0**-53
