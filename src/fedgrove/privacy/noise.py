"""Differential privacy for Wanda's statistics: the squared norms of a window are clipped, and their sum is noisy.

What is protected is one **window** of calibration tokens (``length`` of them) of one client, not a client and not a person
whose text fills several windows. Each window's Σ x² of every input, in every block, is clipped to a norm that the server
chose without looking at text; then clients add Gaussian noise, each its part of what the sum needs, and secure aggregation
opens the sum alone. The sums of all inputs together are one Gaussian mechanism of sensitivity one in units of its noise.

The calibration is the analytic Gaussian mechanism (Balle & Wang, ICML 2018, Theorem 8), exact and in closed form but for a
bisection. Clipping by window and the split of the noise over clients are ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.models.stream import save_tensors

NORM = 1.5  # a window is clipped at this many times the norm that random tokens have


def multiplier(epsilon: float, delta: float) -> float:
    """The smallest standard deviation, for a sensitivity of one, that makes a Gaussian mechanism (ε, δ)-private.

    Args:
        epsilon: > 0.
        delta: 0 < δ < 1.
    """

    def spent(sigma: float) -> float:
        return _below(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * _below(-0.5 / sigma - epsilon * sigma)

    low, high = 1e-3, 1.0
    while spent(high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def clipped(squares: Tensor, norm: float) -> Tensor:
    """A window's Σ x² (in,), scaled down to an L2 norm of ``norm`` where it is longer."""
    return squares * min(1.0, norm / max(float(squares.norm()), 1e-300))


def add_noise(squares: Tensor, norm: float, inputs: int, clients: int, epsilon: float, delta: float, bits: int) -> Tensor:
    """A client's part of the noise on one input's sum, from the operating system's randomness.

    Args:
        squares: (in,) int64 with ``bits`` fractional bits, a sum over clipped windows.
        norm: what each was clipped to.
        inputs: of how many inputs, in all blocks, sums are released: together they are one mechanism.
        clients: how many at least are in the sum that is opened; they share the noise.
    """
    sensitivity = norm + 0.5 * math.sqrt(squares.numel()) * 2.0**-bits  # a window is rounded after it was clipped
    sigma = multiplier(epsilon, delta) * sensitivity * math.sqrt(inputs / clients)
    source = random.SystemRandom()
    noise = torch.tensor([source.gauss(0.0, sigma) for _ in range(squares.numel())], dtype=torch.float64)
    return squares + (noise * 2.0**bits).round().long().to(squares.device)


def once(
    folder: Path, release: str, client: str, make: Callable[[], tuple[dict[str, Tensor], Any]]
) -> tuple[dict[str, Tensor], Any]:
    """A noisy answer, made once: asked again for the newest, a client gives the same one. To draw again would spend ε again.

    Args:
        folder: the client's own disk.
        release: names what is released; the server chooses it, the same for the same place in the same run.
        make: makes the answer, tensors and JSON.

    Raises:
        FedgroveError: the release was made before, and others after it.
    """
    made = _releases(folder)
    file = folder / f"released-{hashlib.sha256(release.encode()).hexdigest()[:16]}.safetensors"
    if not file.is_file():
        if release in made:
            raise FedgroveError(
                f"client '{client}': it has released this once, and its budget is spent; a new run spends it again"
            )
        tensors, told = make()
        save_tensors(tensors, file, {"told": json.dumps(told)})
    if release not in made:
        _note(folder, {**made, release: None})
    for older in folder.glob("released-*.safetensors"):
        if older != file:
            older.unlink()
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(opened.metadata()["told"])  # noqa: SIM118


def agreed(folder: Path, release: str, client: str, survivors: list[str]) -> None:
    """Notes with whom a release was summed; called before anything of the sum is opened.

    Raises:
        FedgroveError: it was summed with others before: the difference of the two sums would hold less noise than promised.
    """
    made = _releases(folder)
    if (made.get(release) or survivors) != survivors:
        raise FedgroveError(f"client '{client}': its noisy answer is in a sum of other clients already; begin a new run")
    _note(folder, {**made, release: survivors})


def _releases(folder: Path) -> dict[str, list[str] | None]:
    file = folder / "released.json"
    made: dict[str, list[str] | None] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return made


def _note(folder: Path, made: dict[str, list[str] | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "released.partial"
    beside.write_text(json.dumps(made), encoding="utf-8")
    beside.replace(folder / "released.json")


def statement(epsilon: float, delta: float, length: int, clients: int) -> str:
    """What is promised, to whom, and what it rests on."""
    return (
        f"({epsilon:g}, {delta:g})-differential privacy of one window of {length} tokens of one client (the same data with or "
        "without it), towards everybody who sees the opened sums and the result, for this one run; it rests on at least "
        f"{clients} clients adding their part of the noise, on secure aggregation, and on Gaussian samples of double "
        "precision. It says nothing of a text that fills several windows, nor of runs before or after."
    )


def _below(x: float) -> float:
    """The normal distribution's Φ."""
    return 0.5 * math.erfc(-x / math.sqrt(2))
