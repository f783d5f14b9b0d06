"""Noise on Wanda's statistics: as much as the promise needs, once, and never without the rest of what it rests on."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

import pytest
import torch

from fedgrove.privacy import noise
from fedgrove.stages.prune.aggregation.pooled import BITS, Statistic
from small import Small, cli, complaint, lines
from test_statistics import prune

NOISY = {"pruner": "wanda", "epsilon": 8.0, "delta": 1e-5}
SECURE = {"secure_aggregation": True}


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-3), (1.0, 1e-5), (8.0, 1e-6), (30.0, 1e-9)])
def test_the_noise_is_as_much_as_the_promise_needs_and_no_more(epsilon: float, delta: float) -> None:
    def spent(sigma: float) -> float:  # the definition, integrated: how far one side exceeds e^ε times the other
        x = torch.linspace(-40 * sigma - 1, 40 * sigma + 1, 2_000_001, dtype=torch.float64)
        p, q = (torch.exp(-((x - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi)) for mean in (1.0, 0.0))
        return float(torch.trapezoid((p - math.exp(epsilon) * q).clamp(min=0), x))

    sigma = noise.multiplier(epsilon, delta)
    assert spent(sigma) == pytest.approx(delta, rel=1e-3)
    assert spent(0.99 * sigma) > delta


def test_windows_are_clipped_one_by_one() -> None:
    torch.manual_seed(0)
    statistic = Statistic("a", torch.ones(5), products=False, norm=3.0)
    loud, quiet = 100 * torch.randn(1, 8, 5), 0.01 * torch.randn(1, 8, 5)
    statistic.add(loud)
    assert float(statistic.squares.double().norm()) * 2.0**-BITS == pytest.approx(3.0, rel=1e-4)
    before = statistic.squares.clone()
    statistic.add(quiet)
    added = (statistic.squares - before).double() * 2.0**-BITS
    torch.testing.assert_close(added, quiet[0].double().square().sum(0), atol=2.0**-BITS, rtol=0)


def test_the_clients_share_the_noise_of_the_sum() -> None:
    zeros = torch.zeros(20_000, dtype=torch.int64)
    total = sum(noise.add_noise(zeros, 2.0, inputs=12, clients=4, epsilon=1.0, delta=1e-5, bits=BITS) for _ in range(4))
    deviation = float((total.double() * 2.0**-BITS).std())  # type: ignore[union-attr]
    sensitivity = 2.0 + 0.5 * math.sqrt(20_000) * 2.0**-BITS
    assert deviation == pytest.approx(noise.multiplier(1.0, 1e-5) * sensitivity * math.sqrt(12), rel=0.04)


def test_a_job_with_noise_says_what_it_promises(small: Small, tmp_path: Path) -> None:
    spec = {f"stages__0__{key}": value for key, value in {**NOISY, "aggregation": "pooled"}.items()}
    job = small.job("noisy", evaluate={}, privacy=SECURE, **spec)
    status, out, _ = cli("plan", job)
    assert status == 0
    assert "(8, 1e-05)-differential privacy of one window of 16 tokens" in " ".join(out.split())
    assert "at least 2 clients" in " ".join(out.split())
    runs = []
    for name in ("one", "two"):
        assert cli("run", job, "--out", tmp_path / name, "--quiet")[0] == 0
        runs.append(json.loads((tmp_path / name / "pruning.json").read_text())["tensors"])
        notes = json.loads((tmp_path / name / "plan-0-prune.json").read_text())["notes"]
        assert notes == [noise.statement(8.0, 1e-5, 16, 2)]
        assert notes[0] in html.unescape((tmp_path / name / "report.html").read_text())
    for one, two in zip(*runs, strict=True):
        assert one["sha256"] != two["sha256"]  # the noise is nobody's to repeat
        assert one["pruned"] == two["pruned"]
    assert not any("epsilon" in json.dumps(line) for line in lines(tmp_path / "one" / "ledger.jsonl"))


def test_little_noise_leaves_the_result_almost_as_it_was(small: Small, tmp_path: Path) -> None:
    text = " ".join(path.read_text() for path in small.texts.values()).split()
    texts = {name: [" ".join(text[200 * i : 200 * i + 200])] for i, name in enumerate(("ash", "birch", "cedar"))}
    plain = prune(small, tmp_path / "plain", texts, pruner="wanda")
    noisy = prune(small, tmp_path / "noisy", texts, privacy=SECURE, pruner="wanda", epsilon=50.0, delta=0.05)
    assert plain.keys() == noisy.keys()
    assert [row[1:] for row in plain.values()] == [row[1:] for row in noisy.values()]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy": {}}, "epsilon: noise protects the sum alone"),
        ({"stages__0__pruner": "sparsegpt"}, 'epsilon: there is noise for pruner "wanda"'),
        ({"stages__0__source": "sequential"}, 'epsilon: there is noise for pruner "wanda"'),
        ({"stages__0__rule": "fedspallm"}, "epsilon belong to aggregation"),
        ({"stages__0__epsilon": 0.0}, "stages.0.epsilon"),
    ],
)
def test_no_promise_is_made_where_none_holds(small: Small, changes: dict[str, object], says: str) -> None:
    spec = {"stages__0__rule": "pooled", "stages__0__epsilon": 1.0, "privacy": SECURE, "evaluate": {}, **changes}
    assert says in complaint("plan", small.job("refused", **spec))
