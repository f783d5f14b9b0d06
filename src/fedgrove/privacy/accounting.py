"""Privacy accounting: the noise that (ε, δ)-differential privacy needs, and the ε that a given noise spends.

- **The Gaussian mechanism** is calibrated exactly by the analytic formula of Balle & Wang (ICML 2018, Theorem 8). Several
  releases of the same unit compose to one Gaussian mechanism with √releases times the sensitivity. This also holds if a
  release depends on the earlier ones.
- **DP-SGD** (Abadi et al., CCS 2016) is amplified by sampling: each window takes part in a step with the same small
  probability. It is accounted for with the privacy loss distribution of Google's ``dp-accounting``, for the composition
  of Poisson-sampled Gaussians; all roundings are pessimistic. Without sampling (probability 1) the Gaussian formula is
  used.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from typing import Any

from fedgrove.errors import FedgroveError


def gaussian_noise_multiplier(epsilon: float, delta: float, releases: int = 1, besides: float | None = None) -> float:
    """The smallest noise multiplier with which all Gaussian releases together are (ε, δ)-differentially private.

    Args:
        epsilon: ε > 0.
        delta: 0 < δ < 1.
        releases: the number of released sums that contain one protected unit.
        besides: the noise multiplier of one more release in the same budget, larger than that of a single one would be.

    Returns:
        The standard deviation of the noise on each sum, in units of its sensitivity.
    """

    def spent(sigma: float) -> float:
        return _normal_cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * _normal_cdf(-0.5 / sigma - epsilon * sigma)

    low, high = 1e-3, 1.0
    while spent(high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    others = 0.0 if besides is None else (high / besides) ** 2  # releases compose by the sum of 1 / multiplier²
    return high * math.sqrt(releases / (1 - others))


PART = 0.25


def noise_of_part(epsilon: float, delta: float) -> float:
    """The noise multiplier of one Gaussian release that gets the fraction ``PART`` of a budget (ε, δ)."""
    return gaussian_noise_multiplier(PART * epsilon, PART * delta)


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


LEAST_NOISE = 0.2  # no job is given less; below it the accountant needs minutes


@lru_cache(maxsize=256)
def dp_sgd_noise_multiplier(epsilon: float, delta: float, rate: float, steps: int, besides: float | None = None) -> float:
    """The smallest noise multiplier, or slightly more, with which ``steps`` steps of DP-SGD are (ε, δ)-private.

    It is at least ``LEAST_NOISE``.

    Args:
        epsilon: ε > 0.
        delta: 0 < δ < 1.
        rate: the probability that a window takes part in a step, independently of all other windows and steps.
        steps: the number of steps in all rounds together.
        besides: the noise multiplier of one more release of every window in the same budget, which is a Gaussian without
            sampling. It has to be that of a part of the budget.

    Returns:
        The standard deviation of the noise on a step's sum of gradients, in units of the clipping norm.

    Raises:
        FedgroveError: ``dp-accounting`` is not installed.
    """
    if rate >= 1:
        return gaussian_noise_multiplier(epsilon, delta, steps, besides)
    require_accountant()
    from dp_accounting import ExplicitBracketInterval, LowerEndpointAndGuess, calibrate_dp_mechanism, pld  # an optional extra

    # LEAST_NOISE is asked last: the less noise there is, the longer the accountant takes, there for seconds.
    bracket: Any
    if dp_sgd_epsilon(1.0, delta, rate, steps, besides) > epsilon:
        bracket = LowerEndpointAndGuess(1.0, 2.6)  # another second end gives other last bits of the noise
    elif dp_sgd_epsilon(LEAST_NOISE, delta, rate, steps, besides) > epsilon:
        bracket = ExplicitBracketInterval(LEAST_NOISE, 1.0)
    else:
        return LEAST_NOISE
    noise_multiplier: float = calibrate_dp_mechanism(
        lambda: _accountant(pld),
        lambda noise: _event(noise, rate, steps, besides),
        epsilon,
        delta,
        bracket,
        tol=2e-3,
    )
    return noise_multiplier


@lru_cache(maxsize=256)
def dp_sgd_epsilon(noise_multiplier: float, delta: float, rate: float, steps: int, besides: float | None = None) -> float:
    """An upper bound of the ε of ``steps`` steps of DP-SGD; arguments as for :func:`dp_sgd_noise_multiplier`.

    Raises:
        FedgroveError: ``dp-accounting`` is not installed.
    """
    require_accountant()
    from dp_accounting import pld  # an optional extra

    return float(_accountant(pld).compose(_event(noise_multiplier, rate, steps, besides)).get_epsilon(delta))


def dp_sgd_keeps(
    noise_multiplier: float, epsilon: float, delta: float, rate: float, steps: int, besides: float | None = None
) -> bool:
    """Whether ``steps`` steps of DP-SGD are (ε, δ)-private; arguments as for :func:`dp_sgd_noise_multiplier`.

    Noise below ``LEAST_NOISE`` is never enough: the answer must not take minutes, because the server chooses the noise.

    Raises:
        FedgroveError: ``rate`` is below 1 and ``dp-accounting`` is not installed.
    """
    if rate >= 1:
        return noise_multiplier >= gaussian_noise_multiplier(epsilon, delta, steps, besides) * (1 - 1e-9)
    return noise_multiplier >= LEAST_NOISE and dp_sgd_epsilon(noise_multiplier, delta, rate, steps, besides) <= epsilon


def require_accountant() -> None:
    """Checks that ``dp-accounting``, the accountant of DP-SGD, is installed.

    Raises:
        FedgroveError: ``dp-accounting`` is not installed.
    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise FedgroveError('epsilon: the privacy accounting of windows needs dp-accounting: pip install "fedgrove[privacy]"')


def _accountant(pld: Any) -> Any:
    from dp_accounting import NeighboringRelation  # an optional extra

    return pld.PLDAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)


def _event(noise_multiplier: float, rate: float, steps: int, besides: float | None) -> Any:
    import dp_accounting as dp  # an optional extra

    step = dp.GaussianDpEvent(noise_multiplier)
    training = dp.SelfComposedDpEvent(step if rate >= 1 else dp.PoissonSampledDpEvent(rate, step), steps)
    return training if besides is None else dp.ComposedDpEvent([training, dp.GaussianDpEvent(besides)])
