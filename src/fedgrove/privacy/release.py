"""Noisy releases: made once, summed with the same clients only, and what they promise in words.

A promise counts the noise that was drawn once. A client that draws again for the same release spends ε again, and two sums
that differ in one client show that client with less noise than promised; so each client notes on its own disk what it has
released, and with whom it was summed.
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


def release_once(
    folder: Path, release: str, client: str, make: Callable[[], tuple[dict[str, Tensor], Any]]
) -> tuple[dict[str, Tensor], Any]:
    """Makes a noisy response once: a client that is asked again for its newest release gives the same one.

    Args:
        folder: the client's own disk.
        release: the name of what is released; the server chooses it, the same for the same place in the same run.
        client: its name, for the message of an error.
        make: makes the response, tensors and JSON.

    Returns:
        The response, read from the disk.

    Raises:
        FedgroveError: this release was made before, and others after it.
    """
    releases = _read(folder)
    file = folder / f"released-{hashlib.sha256(release.encode()).hexdigest()[:16]}.safetensors"
    if not file.is_file():
        if release in releases:
            raise FedgroveError(
                "it has released this once, and its budget is spent", "a new run spends it again", client=client
            )
        tensors, info = make()
        save_tensors(tensors, file, {"info": json.dumps(info)})
    if release not in releases:
        _write(folder, {**releases, release: None})
    for older in folder.glob("released-*.safetensors"):
        if older != file:
            older.unlink()
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        return {name: opened.get_tensor(name) for name in names}, json.loads(opened.metadata()["info"])


def agree_on_survivors(folder: Path, release: str, client: str, survivors: list[str]) -> None:
    """Notes with which clients a release is summed; called before the client helps to open the sum.

    Args:
        folder, release, client: as for :func:`release_once`.
        survivors: the names of the clients in the sum, sorted.

    Raises:
        FedgroveError: it was summed with others before: the difference of the two sums would hold less noise than promised.
    """
    releases = _read(folder)
    if (releases.get(release) or survivors) != survivors:
        raise FedgroveError("its noisy answer is in a sum of other clients already", "begin a new run", client=client)
    _write(folder, {**releases, release: survivors})


def _read(folder: Path) -> dict[str, list[str] | None]:
    """By release, the survivors of its sum; None: nothing was opened."""
    file = folder / "released.json"
    releases: dict[str, list[str] | None] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return releases


def _write(folder: Path, releases: dict[str, list[str] | None]) -> None:
    write_atomically(folder / "released.json", json.dumps(releases))


def statistics_statement(epsilon: float, delta: float, length: int, adders: int) -> str:
    """What noise on a pruning stage's input statistics promises, to whom, and what that rests on."""
    return (
        f"({epsilon:g}, {delta:g})-differential privacy of one window of {length} tokens of one client (the same data with or "
        "without it), towards everybody who sees the opened sums and the result, for this one run; it rests on at least "
        f"{adders} clients adding their part of the noise, on secure aggregation, and on Gaussian samples of double "
        "precision. It says nothing of a text that fills several windows, nor of runs before or after."
    )


def window_statement(epsilon: float, delta: float, length: int, steps: int, clip_norm: float) -> str:
    """What DP-SGD on the clients promises, to whom, and what that rests on."""
    return (
        f"({epsilon:g}, {delta:g})-differential privacy of one window of {length} tokens of one client (the same text with "
        "this window, or with one in its place that teaches nothing), towards everybody, the server included, for this stage "
        f"of this run: {steps} steps, in each of which a window takes part with probability batch / windows, independent of "
        f"the others (Poisson), its gradient clipped to a norm of {clip_norm:g}. It rests on each client adding its own noise, "
        "with Gaussian samples of double precision. It says nothing of a text that fills several windows, of how many tokens "
        "a client has (it says so), nor of other stages and other runs."
    )


def client_statement(epsilon: float, delta: float, rounds: int, clip_norm: float, secure: bool, adders: int) -> str:
    """What noise on the sums of the clients' changes promises, to whom, and what that rests on."""
    if secure:
        towards = "everybody who sees the opened sums and the result"
        rests = f"at least {adders} clients adding their part of the noise, on secure aggregation"
    else:
        towards = "everybody who sees the result, but not towards the server"
        rests = "the server, which sees every change and adds the noise"
    return (
        f"({epsilon:g}, {delta:g})-differential privacy of one whole client (the same run with its change of every round, or "
        f"with zeros in their place), towards {towards}, for this stage of this run: {rounds} rounds with all clients, each "
        f"change clipped to a norm of {clip_norm:g}, equal weights. It rests on {rests}, and on Gaussian samples of double "
        "precision. It says nothing of who takes part, of how many tokens a client has (it says so), nor of other stages and "
        "other runs."
    )
