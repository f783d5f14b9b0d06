"""Clipping and Gaussian noise: on statistics, on changes and on gradients, by the clients or by the server."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedgrove.errors import FedgroveError
from fedgrove.input_statistics.exchange import Noise
from fedgrove.input_statistics.fixed_point import BITS, Statistic
from fedgrove.privacy.accounting import gaussian_noise_multiplier
from fedgrove.privacy.gaussian import GaussianMechanism, clip, gaussian_noise, poisson_sample
from fedgrove.stages.tune import fixed_point as whole


def test_the_noise_is_gaussian_and_whole() -> None:
    drawn = gaussian_noise((400_001,), 3.0)
    assert len(drawn) == 400_001
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(3.0, rel=0.01)
    assert float((drawn.abs() < 3.0).double().mean()) == pytest.approx(0.6827, abs=0.004)
    noisy = GaussianMechanism(1000.0, 1.0, adders=1).add_share(torch.zeros(100, 100, dtype=torch.int32))
    assert noisy.dtype == torch.int32
    assert float(noisy.double().std()) == pytest.approx(1000, rel=0.05)


def test_changes_are_clipped_together_and_rounded_towards_zero() -> None:
    torch.manual_seed(0)
    changes = {"a": torch.randn(5, 3), "b": torch.randn(7, 2)}
    clipped = clip(changes, 0.5)
    sent = whole.encode(clipped, 1.0)
    norm = math.sqrt(sum(float((value.double() * 2.0**-whole.BITS).square().sum()) for value in sent.values()))
    assert 0.4999 < norm <= 0.5
    quiet = {name: 1e-3 * value for name, value in changes.items()}
    torch.testing.assert_close(clip(quiet, 0.5)["a"], quiet["a"].double())
    assert not any(value.any() for value in clip({**changes, "b": changes["b"] / 0}, 0.5).values())
    with pytest.raises(FedgroveError, match="lower learning_rate"):
        whole.encode({"a": torch.tensor([math.nan])}, 1.0)


def test_the_clients_share_the_noise_of_the_sum() -> None:
    zeros = torch.zeros(20_000, dtype=torch.int64)
    noise = Noise(norms={"x": 2.0}, inputs=12, skips_first=False, clients=4, epsilon=1.0, delta=1e-5)
    total = sum(noise.mechanism("x").add_share(zeros) for _ in range(4))
    deviation = float((total.double() * 2.0**-BITS).std())  # type: ignore[union-attr]
    sensitivity = 2.0 + 0.5 * math.sqrt(20_000) * 2.0**-BITS
    assert deviation == pytest.approx(gaussian_noise_multiplier(1.0, 1e-5) * sensitivity * math.sqrt(12), rel=0.04)


def test_windows_are_clipped_one_by_one() -> None:
    torch.manual_seed(0)
    statistic = Statistic("a", torch.ones(5), products=False, mechanism=GaussianMechanism(3.0, 0.0, adders=1))
    loud, quiet = 100 * torch.randn(1, 8, 5), 0.01 * torch.randn(1, 8, 5)
    statistic.add(loud)
    assert float(statistic.squares.double().norm()) * 2.0**-BITS == pytest.approx(3.0, rel=1e-4)
    before = statistic.squares.clone()
    statistic.add(quiet)
    added = (statistic.squares - before).double() * 2.0**-BITS
    torch.testing.assert_close(added, quiet[0].double().square().sum(0), atol=2.0**-BITS, rtol=0)
    before = statistic.squares.clone()
    statistic.add(torch.full((1, 8, 5), math.inf))
    assert torch.equal(statistic.squares, before)


def test_windows_take_part_by_chance_as_often_as_was_counted() -> None:
    counts = torch.zeros(50)
    for _ in range(2000):
        counts[poisson_sample(50, 0.1)] += 1
    assert float(counts.mean()) == pytest.approx(200, rel=0.03)
    assert float(counts.var()) == pytest.approx(2000 * 0.1 * 0.9, rel=0.6)


def test_the_noise_is_added_once_by_the_clients_or_by_the_server() -> None:
    sums = {"a": torch.zeros(200, 50), "b": torch.zeros(10_000, dtype=torch.int64)}
    at_server = GaussianMechanism(2.0, 3.0, adders=0, weight=0.25, bits=10)
    by_clients = replace(at_server, adders=16)
    assert at_server.add_share(sums) is sums
    assert by_clients.add_at_server(sums) is sums
    for noisy, deviation in ((at_server.add_at_server(sums), 3 * 2 * 0.25), (by_clients.add_share(sums), 3 * 2 * 0.25 / 4)):
        assert {name: tensor.dtype for name, tensor in noisy.items()} == {"a": torch.float32, "b": torch.int64}
        for tensor in noisy.values():
            assert float(tensor.double().std()) * 2.0**-10 == pytest.approx(deviation, rel=0.05)


def test_rounding_to_the_nearest_counts_for_all_numbers_of_a_unit() -> None:
    towards_zero = GaussianMechanism(2.0, 1.0, adders=1, bits=4)
    assert towards_zero.sensitivity(400) == 2.0
    assert replace(towards_zero, rounding=0.5).sensitivity(400) == 2.0 + 0.5 * 20 / 16
