"""Checks of a machine: versions, devices, memory, disk, ports, with remedies for those that fail."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

SERVER_PORTS = (8002, 8003)  # the default ports of a FLARE server


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        ok: whether a run is possible as far as this check can tell.
        text: the result. It contains nothing of a client's text, so that it may be sent to others.
        remedy: how to fix it, if not ok.
        sample: a part of the client's own text, which may be shown to the client only.
    """

    name: str
    ok: bool
    text: str
    remedy: str = ""
    sample: str = ""


def check_machine(folder: Path, listen: Sequence[int] = (), connect: Sequence[str] = ()) -> list[Check]:
    """Checks versions, devices, memory, disk and ports.

    Args:
        folder: where runs are written.
        listen: ports on which a server would listen here; if empty, FLARE's default ports are shown and may be in use.
        connect: HOST:PORT addresses to which a client would connect.
    """
    return [*_versions(), _devices(), _memory(), _disk(folder), *_ports(listen), *map(_reaches, connect)]


def _versions() -> list[Check]:
    wrong: list[str] = []
    packages: list[str] = []
    extras: dict[str, bool] = {}
    for line in importlib.metadata.requires("fedgrove") or []:
        wanted = Requirement(line)
        extra = _extra(wanted)
        if extra == "dev":
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if extra is not None:
            extras[extra] = extras.get(extra, True) and version is not None
        elif version is None:
            wrong.append(f"{wanted.name} is missing")
        elif not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
        if wanted.name in ("torch", "transformers"):
            packages.append(f"{wanted.name} {version}")
    said = f"fedgrove {importlib.metadata.version('fedgrove')}, Python {platform.python_version()}, {', '.join(packages)}"
    remedy = "" if not wrong else "pip install --upgrade fedgrove"
    checks = [Check("versions", not wrong, "; ".join([said, *wrong]), remedy)]
    if extras:
        have = [name for name, there in sorted(extras.items()) if there]
        lack = [f'{name} (pip install "fedgrove[{name}]")' for name, there in sorted(extras.items()) if not there]
        checks.append(
            Check("extras", True, f"installed: {', '.join(have) or 'none'}; not installed: {', '.join(lack) or 'none'}")
        )
    return checks


def _extra(wanted: Requirement) -> str | None:
    """The extra that a requirement belongs to; None: it is always required."""
    if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
        return None
    names = importlib.metadata.metadata("fedgrove").get_all("Provides-Extra") or []
    return next((name for name in names if wanted.marker.evaluate({"extra": name})), None)


def _devices() -> Check:
    cpu = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    gpus = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append(f"cuda:{i} {torch.cuda.get_device_name(i)}, {size_of(free)} of {size_of(total)} free")
    return Check("devices", True, "; ".join([cpu, *(gpus or ["no GPU"])]))


def _memory() -> Check:
    memory = psutil.virtual_memory()
    said = f"{size_of(memory.available)} of {size_of(memory.total)} are free"
    enough = memory.available >= 2**30  # the libraries alone take half of that
    return Check("memory", enough, said, "" if enough else "close other programs: fedgrove alone needs about 1 GiB")


def _disk(folder: Path) -> Check:
    free = free_disk(folder)
    enough = free >= 2**30
    return Check("disk", enough, f"{size_of(free)} are free in {folder.resolve()}", "" if enough else "free some space")


def free_disk(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    at = folder.resolve()
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at).free


def free_memory() -> int:
    """Free bytes of the GPU with the most free memory, or of this machine if there is no GPU."""
    if torch.cuda.is_available():
        return max(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return int(psutil.virtual_memory().available)


def _ports(listen: Iterable[int]) -> list[Check]:
    listen = list(listen)
    free = {port: _is_free(port) for port in listen or SERVER_PORTS}
    said = "; ".join(f"{port} {'free' if is_free else 'in use by another program'}" for port, is_free in free.items())
    if not listen:
        return [Check("ports", True, f"{said} (only the server of a federation needs them; a run on one machine uses none)")]
    ok = all(free.values())
    return [Check("ports", ok, said, "" if ok else "stop the other program, or use another port for the server")]


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True


def _reaches(address: str) -> Check:
    host, _, port = address.rpartition(":")
    name = f"reach {address}"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        return Check(name, False, "this is not HOST:PORT", "write for instance server.example.org:8002")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return Check(name, True, "connected")
    except OSError as error:
        what = str(error.strerror or error or type(error).__name__)
        return Check(name, False, what, "start the server, or allow outgoing TCP to it in your firewall")


def size_of(number: float) -> str:
    """Bytes as text with binary units, such as "3.4 GiB"; "any" for an unlimited amount."""
    if not math.isfinite(number):
        return "any"
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number:,.0f} bytes"
