"""How much noise a promise needs: as its definition says, and no more."""

from __future__ import annotations

import math

import pytest
import torch

from fedgrove.privacy import accounting


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-3), (1.0, 1e-5), (8.0, 1e-6), (30.0, 1e-9)])
def test_the_noise_is_as_much_as_the_promise_needs_and_no_more(epsilon: float, delta: float) -> None:
    def spent(sigma: float) -> float:  # the definition, integrated: how far one side exceeds e^ε times the other
        x = torch.linspace(-40 * sigma - 1, 40 * sigma + 1, 2_000_001, dtype=torch.float64)
        p, q = (torch.exp(-((x - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi)) for mean in (1.0, 0.0))
        return float(torch.trapezoid((p - math.exp(epsilon) * q).clamp(min=0), x))

    sigma = accounting.gaussian_noise_multiplier(epsilon, delta)
    assert spent(sigma) == pytest.approx(delta, rel=1e-3)
    assert spent(0.99 * sigma) > delta


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (0.7, 0.5), (2.0, 1.0)])
def test_a_step_spends_what_its_definition_says(noise: float, rate: float) -> None:
    x = torch.linspace(-15 * noise, 15 * noise + 1, 100_001, dtype=torch.float64)

    def density(mean: float) -> torch.Tensor:
        return torch.exp(-((x - mean) ** 2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))

    without, with_it = density(0.0), (1 - rate) * density(0.0) + rate * density(1.0)

    def delta(epsilon: float) -> float:  # the larger of both directions
        pairs = ((with_it, without), (without, with_it))
        return max(float(torch.trapezoid((p - math.exp(epsilon) * q).clamp(min=0), x)) for p, q in pairs)

    epsilon = accounting.dp_sgd_epsilon(noise, 1e-4, rate, 1)
    assert delta(epsilon * 1.001) <= 1e-4
    assert delta(epsilon * 0.98) > 1e-4


def test_many_steps_without_sampling_are_one_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    event = accounting._event
    monkeypatch.setattr(accounting, "_event", lambda noise, *rest: asked.append(noise) or event(noise, *rest))
    noise = accounting.gaussian_noise_multiplier(3.0, 1e-5, 16)
    assert noise == pytest.approx(4 * accounting.gaussian_noise_multiplier(3.0, 1e-5))
    assert accounting.dp_sgd_epsilon(noise, 1e-5, 1.0, 16) == pytest.approx(3.0, rel=2e-3)
    assert accounting.dp_sgd_noise_multiplier(3.0, 1e-5, 1.0, 16) == noise
    assert accounting.dp_sgd_noise_multiplier(3.0, 1e-5, 0.99, 16) == pytest.approx(noise, rel=0.02)
    assert min(asked) == 1.0, "what less noise spends takes seconds to count"


def test_a_release_besides_training_takes_its_part_of_the_budget() -> None:
    epsilon, delta, rate, steps = 4.0, 1e-5, 0.05, 40
    besides = accounting.noise_of_part(epsilon, delta)
    assert besides == accounting.gaussian_noise_multiplier(1.0, 2.5e-6)
    alone, noise = (accounting.dp_sgd_noise_multiplier(epsilon, delta, rate, steps, one) for one in (None, besides))
    assert noise > alone
    assert accounting.dp_sgd_keeps(noise, epsilon, delta, rate, steps, besides)
    assert not accounting.dp_sgd_keeps(alone, epsilon, delta, rate, steps, besides)
    whole = accounting.dp_sgd_noise_multiplier(epsilon, delta, 1.0, steps, besides)
    both = 1 / math.sqrt(steps / whole**2 + 1 / besides**2)  # Gaussians compose to one
    assert both == pytest.approx(accounting.gaussian_noise_multiplier(epsilon, delta))
    assert accounting.dp_sgd_epsilon(whole, delta, 1.0, steps, besides) == pytest.approx(epsilon, rel=2e-3)


def test_noise_below_the_least_is_refused_without_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "dp_sgd_epsilon", lambda *arguments: pytest.fail("this takes minutes"))
    assert not accounting.dp_sgd_keeps(0.01, 1.0, 1e-5, 0.1, 4)


def test_a_promise_that_hardly_any_noise_keeps_gets_the_least() -> None:
    assert accounting.dp_sgd_noise_multiplier(100.0, 1e-3, 0.001, 1) == accounting.LEAST_NOISE
