"""Noisy releases: each is made once; and the privacy guarantees in words.

The accounting assumes that noise is drawn once per release. A client that draws noise again for the same release spends
ε again. So each client records on its own disk what it has released. With which clients it was summed is recorded for
every secure sum, noisy or not: see :class:`fedgrove.privacy.secagg.store.SessionStore`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.files import write_atomically
from fedgrove.models.tensor_files import save_tensors
from fedgrove.privacy.accounting import PART


def release_once(
    folder: Path, release: str, client: str, make: Callable[[], tuple[dict[str, Tensor], Any]]
) -> tuple[dict[str, Tensor], Any]:
    """Makes a noisy response once; a repeated request for the newest release gets the same response.

    Args:
        folder: a folder on the client's own disk.
        release: the name of the release: its place in the job. ``folder`` belongs to one job.
        client: the client's name, for error messages.
        make: makes the response: tensors, and a value that JSON can represent.

    Returns:
        The response, as read from the disk.

    Raises:
        FedgroveError: this release was made before, and another one after it.
    """
    releases = _read(folder)
    file = folder / f"released-{hashlib.sha256(release.encode()).hexdigest()[:16]}.safetensors"
    if not file.is_file():
        if release in releases:
            raise FedgroveError(
                "it has released this once, and its privacy budget is spent",
                "the same job under another name spends it again",
                client=client,
            )
        tensors, info = make()
        save_tensors(tensors, file, {"info": json.dumps(info)})
    if release not in releases:
        write_atomically(folder / "released.json", json.dumps([*releases, release]), fsync=True)
    for older in folder.glob("released-*.safetensors"):
        if older != file:
            older.unlink()
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        return {name: opened.get_tensor(name) for name in names}, json.loads(opened.metadata()["info"])


def _read(folder: Path) -> list[str]:
    """The names of all releases that were made."""
    file = folder / "released.json"
    releases: list[str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return releases


def statistics_statement(epsilon: float, delta: float, length: int, adders: int) -> str:
    """The guarantee of noise on a pruning stage's input statistics: for what, towards whom, on what assumptions."""
    return (
        f"({epsilon:g}, {delta:g})-differential privacy of one window of {length} tokens of one client (the same data with or "
        "without it), towards everybody who sees the opened sums and the result, for this run only. It assumes that at least "
        f"{adders} clients add their part of the noise, secure aggregation, and Gaussian samples in double precision. It does "
        "not cover a text that fills several windows, nor earlier or later runs."
    )


def window_statement(
    epsilon: float, delta: float, length: int, steps: int, clip_norm: float, clipped: str, gate: bool = False
) -> str:
    """The guarantee of noise in every step on the clients: for what, towards whom, on what assumptions.

    Args:
        clipped: what of a window is clipped, such as "gradient".
        gate: whether a gate is fitted with a part of the budget.
    """
    fit = f"one release of the sum of all windows' features, each of norm 1, for {PART:.0%} of the budget, and " if gate else ""
    nothing = f"no {clipped} and no features" if gate else f"no {clipped}"
    return (
        f"({epsilon:g}, {delta:g})-differential privacy of one window of {length} tokens of one client (the same text with "
        f"this window, or with a window in its place that has {nothing}), towards everybody, server included, for this "
        f"stage of this run: {fit}{steps} steps, in each of which a window takes part with probability batch / windows, "
        f"independent of the others (Poisson), its {clipped} clipped to a norm of {clip_norm:g}. It assumes that each client "
        "adds its own noise, with Gaussian samples in double precision. It does not cover a text that fills several windows, "
        "the number of tokens of a client (each client reports it), other stages or other runs."
    )


def client_statement(
    epsilon: float, delta: float, rounds: int, clip_norm: float, secure: bool, adders: int, clipped: str
) -> str:
    """The guarantee of noise on the sums over clients: for what, towards whom, on what assumptions.

    Args:
        clipped: what of a client is clipped, such as "change".
    """
    if secure:
        towards = "everybody who sees the opened sums and the result"
        rests = f"that at least {adders} clients add their part of the noise, secure aggregation"
    else:
        towards = "everybody who sees the result, but not towards the server"
        rests = "that the server, which sees every change, adds the noise"
    return (
        f"({epsilon:g}, {delta:g})-differential privacy of one whole client (the same run with its {clipped} of every round, "
        f"or with zeros in their place), towards {towards}, for this stage of this run: {rounds} rounds with all clients, each "
        f"client's {clipped} clipped to a norm of {clip_norm:g}, equal weights. It assumes {rests}, and Gaussian samples in "
        "double precision. It does not cover who takes part, the number of tokens of a client (each client reports it), other "
        "stages or other runs."
    )
