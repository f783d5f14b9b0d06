"""Differential privacy for tuning: what is clipped, how much noise that needs, who adds it, and what is promised.

Two promises, by ``protects``:

- **window**: every client trains with DP-SGD (Abadi et al., CCS 2016): in each step every window of its text takes part
  with the same small probability, its gradient is clipped, and the client adds Gaussian noise to their sum. What leaves the
  client is private already, also towards the server, and so is whatever is made of it. A window belongs to one client, so the
  promise for all is the weakest of theirs; noise is chosen for each by the number of its windows.
- **client**: a client's whole change is clipped and the sum of a round gets noise (McMahan et al., ICLR 2018, with all
  clients in every round, so nothing is gained by sampling). Under secure aggregation each client adds its part of the noise;
  without, the server adds it and has to be trusted with the changes.

The accountant of *window* is the privacy loss distribution of Google's ``dp-accounting`` (rounded up everywhere), of
Poisson-sampled Gaussians that are composed. Where nothing is sampled none is needed: Gaussians of T rounds are one Gaussian
of √T times the sensitivity, calibrated in closed form (Balle & Wang, ICML 2018).
"""

from __future__ import annotations

import importlib.util
import math
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.privacy.noise import multiplier


def need_accountant() -> None:
    """Refuses to go on without the accountant.

    Raises:
        FedgroveError: ``dp-accounting`` is not installed.
    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise FedgroveError('epsilon: counting the budget of windows needs dp-accounting: pip install "fedgrove[privacy]"')


@lru_cache(maxsize=256)
def spent(noise: float, rate: float, steps: int, delta: float) -> float:
    """The ε of so many steps of DP-SGD, an upper bound.

    Args:
        noise: standard deviation of a step's noise, in units of the norm that gradients are clipped to.
        rate: the probability with which a window takes part in a step, independent of all else.
        steps: how many there are, in all rounds.
        delta: δ.
    """
    need_accountant()
    from dp_accounting import pld

    return float(_accountant(pld).compose(_event(noise, rate, steps)).get_epsilon(delta))


def enough(noise: float, epsilon: float, delta: float, rate: float, steps: int) -> bool:
    """Whether so many steps of DP-SGD keep to (ε, δ); see :func:`spent`."""
    if rate >= 1:
        return noise >= client_noise(epsilon, delta, steps) * (1 - 1e-9)
    return spent(noise, rate, steps, delta) <= epsilon


@lru_cache(maxsize=256)
def window_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise, or a little more, with which so many steps of DP-SGD keep to (ε, δ); see :func:`spent`."""
    if rate >= 1:
        return client_noise(epsilon, delta, steps)
    need_accountant()
    from dp_accounting import LowerEndpointAndGuess, calibrate_dp_mechanism, pld

    found: float = calibrate_dp_mechanism(
        lambda: _accountant(pld),
        lambda noise: _event(noise, rate, steps),
        epsilon,
        delta,
        LowerEndpointAndGuess(0.2, 1.0),
        tol=2e-3,
    )
    return found


def _accountant(pld: Any) -> Any:
    from dp_accounting import NeighboringRelation

    return pld.PLDAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)


def _event(noise: float, rate: float, steps: int) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    step = GaussianDpEvent(noise)
    return SelfComposedDpEvent(step if rate >= 1 else PoissonSampledDpEvent(rate, step), steps)


def client_noise(epsilon: float, delta: float, rounds: int) -> float:
    """The noise on the sum of a round, in units of what one client can change of it, so that all rounds keep to (ε, δ)."""
    return multiplier(epsilon, delta) * math.sqrt(rounds)


def gaussian(numel: int, sigma: float) -> Tensor:
    """(numel,) float64: Gaussian noise from the operating system's randomness, by Box and Muller's formula.

    Doubles of 53 bits: what lies past 8.6 σ never comes, which is 10⁻¹⁷ of probability.
    """
    half = (numel + 1) // 2
    radius, angle = (torch.sqrt(-2 * torch.log(_uniform(half))), 2 * math.pi * _uniform(half))
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:numel] * sigma


def picked(number: int, rate: float) -> list[int]:
    """Which of so many windows take part in a step: each with probability ``rate``, by the operating system's randomness."""
    return torch.nonzero(_uniform(number) <= rate).flatten().tolist()


def _uniform(number: int) -> Tensor:
    """(number,) float64, from above 0 to 1."""
    raw = (
        torch.frombuffer(bytearray(os.urandom(8 * number)), dtype=torch.int64) if number else torch.zeros(0, dtype=torch.int64)
    )
    return ((raw & (2**53 - 1)) + 1).double() * 2.0**-53


def add_whole(total: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
    """Whole numbers with noise: a Gaussian of standard deviation ``sigma``, rounded, on each."""
    noisy = {}
    for name, value in sorted(total.items()):
        noisy[name] = (value.long() + gaussian(value.numel(), sigma).round().long().view(value.shape)).to(value.dtype)
    return noisy


def clipped(changes: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    """A client's changes, together no longer than ``bound``; nothing at all where one of them is not finite."""
    squares = sum((change.double().square().sum() for change in changes.values()), torch.zeros((), dtype=torch.float64))
    norm = math.sqrt(float(squares)) if torch.isfinite(squares) else math.inf
    if not math.isfinite(norm):
        return {name: torch.zeros_like(change, dtype=torch.float64) for name, change in changes.items()}
    scale = min(1.0, bound * (1 - 1e-9) / max(norm, 1e-300))  # less than the rounding of float64 could add
    return {name: change.double() * scale for name, change in changes.items()}


def window_statement(epsilon: float, delta: float, length: int, steps: int, bound: float) -> str:
    """What DP-SGD on the clients promises, to whom, and what it rests on."""
    return (
        f"({epsilon:g}, {delta:g})-differential privacy of one window of {length} tokens of one client (the same text with "
        "this window, or with one in its place that teaches nothing), towards everybody, the server included, for this stage "
        f"of this run: {steps} steps, in each of which a window takes part with probability batch / windows, independent of "
        f"the others (Poisson), its gradient clipped to a norm of {bound:g}. It rests on each client adding its own noise, "
        "with Gaussian samples of double precision. It says nothing of a text that fills several windows, of how many tokens "
        "a client has (it says so), nor of other stages and other runs."
    )


def client_statement(epsilon: float, delta: float, rounds: int, bound: float, secure: bool, adders: int) -> str:
    """What noise on the sums of changes promises, to whom, and what it rests on."""
    if secure:
        towards = "everybody who sees the opened sums and the result"
        rests = f"at least {adders} clients adding their part of the noise, on secure aggregation"
    else:
        towards = "everybody who sees the result, but not towards the server"
        rests = "the server, which sees every change and adds the noise"
    return (
        f"({epsilon:g}, {delta:g})-differential privacy of one whole client (the same run with its change of every round, or "
        f"with zeros in their place), towards {towards}, for this stage of this run: {rounds} rounds with all clients, each "
        f"change clipped to a norm of {bound:g}, equal weights. It rests on {rests}, and on Gaussian samples of double "
        "precision. It says nothing of who takes part, of how many tokens a client has (it says so), nor of other stages and "
        "other runs."
    )
