"""Starts and stops the process of a kit: the server's, or a site's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from fedgrove.deploy.flare import leftovers, require_flare
from fedgrove.deploy.flare.files import SERVER, SITE, ServerFile, SiteFile, read
from fedgrove.deploy.flare.kits import keep_jobs_in, name_of
from fedgrove.errors import FedgroveError
from fedgrove.files import private_files

PID = "process.pid"
MODULES = "nvflare.private.fed.app"
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while waiting slow down a busy machine
    "MALLOC_ARENA_MAX": "4",
    "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "15",  # a run that has ended does not wait 15 minutes for a site that is gone
}
LONGEST = 3500  # bytes of a kit's path: the system allows 4095, and files of a run lie a few folders deeper
READY = 30.0  # seconds that a start waits until the server listens


def kind_of(kit: Path) -> str:
    """The kind of a kit: "server", "site" or "operator".

    Raises:
        FedgroveError: the folder is not a kit.
    """
    for kind, file in (("server", "fed_server.json"), ("site", "fed_client.json"), ("operator", "fed_admin.json")):
        if (kit / "startup" / file).is_file():
            return kind
    raise FedgroveError(f"{kit}: this is not a kit", "name a folder that `fedgrove federation kits` made")


def check_path(kit: Path) -> None:
    """Raises :class:`FedgroveError` if FLARE or a log could not write the kit's path. Spaces and any script are fine."""
    encoded = os.fsencode(kit.resolve())
    shown = encoded.decode("utf-8", "replace")
    if not str(kit.resolve()).isprintable():
        raise FedgroveError(
            f"{shown}: the path has a control character, or is not UTF-8", "move the kit to a folder without it"
        )
    if len(encoded) > LONGEST:
        raise FedgroveError(
            f"{shown[:200]}…: the path is {len(encoded)} bytes long, {LONGEST} are possible", "move the kit to a shorter path"
        )


def start(kit: Path, foreground: bool = False) -> int:
    """Starts the process of a server's or site's kit.

    Args:
        foreground: replace the calling process by it (exec), for systemd and containers; then this never returns.

    Returns:
        The process id.

    Raises:
        FedgroveError: it is an operator's kit, it is already running, its settings file is not valid, its folder cannot
            be written to or has a path that does not work, or it ended at once.
    """
    require_flare()
    kit = kit.resolve()
    check_path(kit)
    kind = kind_of(kit)
    if kind == "operator":
        raise FedgroveError(
            f"{kit}: an operator's kit has no process to start", f"`fedgrove federation submit JOB.toml --kit {kit}`"
        )
    settings = read(kit / (SERVER if kind == "server" else SITE), ServerFile if kind == "server" else SiteFile)
    if running(kit) is not None:
        raise FedgroveError(f"{kit}: it is already running", f"`fedgrove federation stop {kit}` stops it")
    if isinstance(settings, SiteFile):
        leftovers.clean_old(kit, settings)
    with private_files():  # the process inherits it
        return _start(kit, kind, foreground)


def _start(kit: Path, kind: str, foreground: bool) -> int:
    try:
        if kind == "server":
            keep_jobs_in(kit)
        for folder in ("transfer", "log"):
            (kit / folder).mkdir(exist_ok=True)
        (kit / PID).write_text(str(os.getpid()))
        log = (kit / "log" / "console.log").open("ab")
    except OSError as error:
        raise FedgroveError(
            f"{kit}: it cannot be written to ({error.strerror or type(error).__name__})",
            "make it writable for this user, and free some space if its disk is full",
        ) from error
    environment = {**ENVIRONMENT, **os.environ}
    with log:
        if foreground:
            os.execve(sys.executable, _command(kit, kind), environment)
        process = subprocess.Popen(
            _command(kit, kind), env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    (kit / PID).write_text(str(process.pid))
    ends = time.monotonic() + READY
    while time.monotonic() < ends and not (kind == "server" and reachable(*address(kit))):
        if process.poll() is not None:
            raise FedgroveError(
                f"{kit}: it ended at once (status {process.returncode})", f"{kit / 'log' / 'console.log'} says why"
            )
        if kind == "site" and time.monotonic() > ends - READY + 1:
            break  # a site connects as soon as the server can be reached
        time.sleep(0.1)
    return process.pid


def stop(kit: Path) -> None:
    """Stops a kit's process and everything that it started.

    Raises:
        FedgroveError: it is not running.
    """
    process = running(kit)
    if process is None:
        raise FedgroveError(f"{kit}: it is not running")
    processes = [*process.children(recursive=True), process]
    for one in reversed(processes):  # the parent first, so that it does not restart its children
        _quietly(one.terminate)
    _, alive = psutil.wait_procs(processes, timeout=5)
    for one in alive:
        _quietly(one.kill)
    psutil.wait_procs(alive, timeout=5)
    (kit / PID).unlink(missing_ok=True)
    if kind_of(kit) == "site":
        clean(kit)


def clean(kit: Path) -> list[Path]:
    """Removes what must not stay of all runs of a site, see :mod:`fedgrove.deploy.flare.leftovers`.

    Returns:
        The folders of runs that had something left.

    Raises:
        FedgroveError: it is not a site's kit, its settings file is not valid, or it is running.
    """
    if kind_of(kit) != "site":
        raise FedgroveError(f"{kit}: only a site has working files of runs", "name a site's kit")
    if running(kit) is not None:
        raise FedgroveError(f"{kit}: it is running", f"`fedgrove federation stop {kit}` stops it, and cleans as well")
    return [folder for folder in leftovers.run_folders(kit, read(kit / SITE, SiteFile)) if leftovers.clean(folder)]


def running(kit: Path) -> psutil.Process | None:
    """The kit's process, if it runs."""
    try:
        process = psutil.Process(int((kit / PID).read_text()))
        # In a container the process id is the same after every restart: the file may name this very process, which has
        # not started the kit yet.
        is_kits = str(kit.resolve()) in process.cmdline() and any(part.startswith(MODULES) for part in process.cmdline())
        if is_kits and process.status() != psutil.STATUS_ZOMBIE:
            return process
    except (OSError, ValueError, psutil.Error):
        pass
    return None


def address(kit: Path) -> tuple[str, int]:
    """The host and port by which this kit reaches the server."""
    kind = kind_of(kit)
    if kind == "operator":
        admin = json.loads((kit / "startup" / "fed_admin.json").read_text(encoding="utf-8"))["admin"]
        return admin["host"], int(admin["port"])
    file = "fed_server.json" if kind == "server" else "fed_client.json"
    settings = json.loads((kit / "startup" / file).read_text(encoding="utf-8"))
    host, _, port = settings["servers"][0]["service"]["target"].rpartition(":")
    return host, int(port)


def reachable(host: str, port: int) -> bool:
    """Whether a TCP connection to that address succeeds within 3 s."""
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False


def _command(kit: Path, kind: str) -> list[str]:
    role = "server" if kind == "server" else "client"
    settings = ["secure_train=true", "org=fedgrove", "config_folder=config"]
    if kind == "site":
        settings.append(f"uid={name_of(kit)}")
    module = f"{MODULES}.{role}.{role}_train"
    return [sys.executable, "-u", "-m", module, "-m", str(kit), "-s", f"fed_{role}.json", "--set", *settings]


def _quietly(action: Callable[[], None]) -> None:
    with suppress(psutil.Error):
        action()
