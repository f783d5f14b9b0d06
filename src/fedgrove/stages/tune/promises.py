"""The noise that a plan's differential privacy needs, and what it promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fedgrove.errors import FedgroveError
from fedgrove.privacy.accounting import dp_sgd_noise_multiplier, gaussian_noise_multiplier, noise_of_part
from fedgrove.privacy.release import client_statement, window_statement
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.stages.tune import fixed_point
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.parametrizations import parametrization_of
from fedgrove.stages.tune.seeds.steps import LOSS_BITS, MOST_SUM


class Counted(Protocol):
    """What of an assignment counts here."""

    @property
    def batch(self) -> int:
        """Windows of a step."""

    @property
    def tokens(self) -> int:
        """Of the client's text."""


def noise(config: Config, assignments: Mapping[str, Counted]) -> dict[str, float]:
    """By client, the noise multiplier of DP-SGD; empty without."""
    if config.epsilon is None or not config.trainer_method.PRIVATE:
        return {}
    steps = config.rounds * config.steps
    besides = noise_of_part(config.epsilon, config.delta) if config.noisy_gate else None
    rates = {name: min(1.0, one.batch * config.length / one.tokens) for name, one in assignments.items()}
    return {name: dp_sgd_noise_multiplier(config.epsilon, config.delta, rate, steps, besides) for name, rate in rates.items()}


def notes(config: Config, assignments: Mapping[str, Counted], secure: bool) -> list[str]:
    """What the noise guarantees, in words.

    Raises:
        FedgroveError: ``epsilon`` needs too much noise.
    """
    if config.epsilon is None:
        return []
    clients, steps = len(assignments), config.rounds * config.steps
    what = parametrization_of(config.parametrization).CLIPPED
    if config.trainer_method.PRIVATE:
        sigma = max(noise(config, assignments).values()) * config.dp_clip
        _check(config, sigma)
        gate = config.noisy_gate
        return [window_statement(config.epsilon, config.delta, config.length, steps, config.dp_clip, what[1], gate)]
    sigma = gaussian_noise_multiplier(config.epsilon, config.delta, config.rounds) * config.dp_clip / clients
    _check(config, sigma * clients * config.batches[-1])
    if sigma > fixed_point.LARGEST / 16:
        raise FedgroveError(
            f"epsilon: every number would get noise of {sigma:.3g}, which is too large for the fixed-point sum",
            "raise epsilon, or lower dp_clip or rounds",
        )
    adders = min_survivors(clients)
    return [client_statement(config.epsilon, config.delta, config.rounds, config.dp_clip, secure, adders, what[0])]


def _check(config: Config, sigma: float) -> None:
    """Refuses noise that the ring of loss differences cannot hold.

    Args:
        sigma: of the noise on a sum of slopes.
    """
    if isinstance(config.perturbation, str):
        return
    if sigma * 2 * config.perturbation * 2.0**LOSS_BITS > MOST_SUM / 16:
        raise FedgroveError(
            f"epsilon: every loss difference would get noise of {sigma * 2 * config.perturbation:.3g}, which is too large for "
            "its ring",
            "raise epsilon, or lower perturbation, dp_clip, rounds or steps",
        )
