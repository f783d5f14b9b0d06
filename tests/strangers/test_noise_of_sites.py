"""Measured noise: for random jobs that a site accepts, its response has at least the noise that the job promises.

The promise is computed from the job (ε, δ, clipping, rounds, the number of clients), not from the request. Two responses
to the same request differ by noise alone.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hostile_server import FIXED, OPEN, POOLED, RUN, SECURE, TUNE, VICTIM, Hostile, hostile_run

from fedgrove.client import serve
from fedgrove.client.windows import training_windows
from fedgrove.deploy.flare.files import SITE, SiteFile, read
from fedgrove.deploy.flare.installation import Installation
from fedgrove.input_statistics.fixed_point import BITS
from fedgrove.privacy import gaussian
from fedgrove.privacy.accounting import dp_sgd_noise_multiplier, gaussian_noise_multiplier
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.rounds.request import Request, Tensors
from fedgrove.stages.prune.exchanges.statistics import SumInputs
from fedgrove.stages.tune import fixed_point
from small import CLIENTS, LENGTH, Small

MARGIN = 0.85  # of hundreds of numbers, the measured deviation is within 10 % of the true one
SUMS = 8  # inputs of the linears of the small model's two blocks
ADDERS = min_survivors(len(CLIENTS))


class Watched(Hostile):
    """An engine that keeps the first honest request of every kind, and attacks nobody."""

    def attack(self, kind: str, message: bytes) -> None:
        self.accepted.setdefault((kind, ""), message)


def drawn(seed: int) -> dict[str, Any]:
    """Random keys of a job."""
    rng = random.Random(seed)
    return {"epsilon": round(rng.uniform(0.5, 20), 2), "delta": 10 ** rng.uniform(-6, -3)}


def noise_of(
    small: Small, folder: Path, allow: dict[str, Any], stage: dict[str, Any], kind: str
) -> tuple[Request, Tensors, Any]:
    """An honest request of a job that a site accepted, the noise of the site's response, and the site as a client."""
    allow = {**allow, "alone": False, "epsilon": stage["epsilon"], "delta": stage["delta"], "budget": stage["epsilon"]}
    engine = hostile_run(small, folder, "noise", allow, [stage], set(), set(), Watched)
    request, tensors, _ = serve.read(kind, engine.accepted[kind, ""])
    kit = engine.kits[VICTIM]
    client = Installation(kit, read(kit / SITE, SiteFile), RUN, engine.job).client("m")
    with torch.no_grad():
        one, other = (request.respond(tensors, client, "cpu").tensors for _ in range(2))
    return request, {name: (one[name].double() - other[name].double()) / 2**0.5 for name in one}, client


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    monkeypatch.setattr(gaussian.os, "urandom", rng.randbytes)


@pytest.mark.parametrize("seed", range(2))
def test_sums_of_a_site_have_the_noise_that_the_job_promises(small: Small, tmp_path: Path, seed: int) -> None:
    stage = {**POOLED, **drawn(seed)}
    request, noise, _ = noise_of(small, tmp_path, SECURE, stage, "prune/statistics")
    assert isinstance(request, SumInputs)
    assert request.noise
    multiplier = gaussian_noise_multiplier(stage["epsilon"], stage["delta"], SUMS)
    ratios = []
    for name, norm in request.noise.norms.items():
        promised = multiplier * norm / ADDERS**0.5 * 2.0**BITS
        ratios.append(noise[f"change/{name}/squares"] / promised)
    assert float(torch.cat(ratios).std()) > MARGIN


@pytest.mark.parametrize("seed", range(2))
def test_changes_of_a_site_have_the_noise_that_the_job_promises(small: Small, tmp_path: Path, seed: int) -> None:
    rounds, clip = 1 + seed, (0.5, 2.0)[seed]
    stage = {**FIXED, **drawn(seed), "dp_unit": "client", "rounds": rounds, "dp_clip": clip}
    _, noise, _ = noise_of(small, tmp_path, SECURE, stage, "tune/train")
    multiplier = gaussian_noise_multiplier(stage["epsilon"], stage["delta"], rounds)
    promised = multiplier * clip / len(CLIENTS) / ADDERS**0.5 * 2.0**fixed_point.BITS
    assert float(torch.cat([value.flatten() for value in noise.values()]).std()) > MARGIN * promised


@pytest.mark.parametrize("seed", range(2))
def test_steps_of_a_site_have_the_noise_that_the_job_promises(small: Small, tmp_path: Path, seed: int) -> None:
    clip, rate = (0.5, 2.0)[seed], 1e-3
    stage = {
        **TUNE, **drawn(seed), "method": "lora", "rounds": 1, "steps": 1, "batches": [64], "dp_clip": clip,
        "optimizer": "sgd", "learning_rate": rate, "precision": "float32",
    }  # fmt: skip
    _, noise, client = noise_of(small, tmp_path, OPEN, stage, "tune/train")
    windows = len(training_windows(client, LENGTH)[0])
    assert windows < 64, "each window takes part in the step"
    multiplier = dp_sgd_noise_multiplier(stage["epsilon"], stage["delta"], 1.0, 1)
    promised = rate * multiplier * clip / windows
    measured = torch.cat([value.flatten() for name, value in noise.items() if name.endswith("/a")])
    assert float(measured.std()) > MARGIN * promised
