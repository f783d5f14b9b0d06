"""Real seconds of a federation whose clients are slowed to their capabilities: FedPipe beside uniform LoRA.

    .venv/bin/python bench/slowed.py --data ../shared/data --task medquad --write

The four unequal clients of ``bench/tune.py`` are sites of an NVIDIA FLARE federation on this machine, each with its processes.
A site computes on one thread, and its working process gets only so much of a core as its speed says: it is stopped as long
as it has had more (SIGSTOP, SIGCONT). Links are those of the loopback address. The time of a round is this machine's, from
the server's last measurement of the loss to the end of the aggregation; measuring the importance is part of the first round,
measuring the loss is part of none. The modeled times stand beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import page
import psutil
import tune
from arguments import existing_folder
from transformers.utils import logging

from fedgrove.deploy.flare.node import running
from fedgrove.events import Event, Measured, Phase

CLIENTS = 4
CORES = 0.06  # of one core, what a client of speed 1 gets
WORKER = "multiprocessing.spawn"  # in the command line of the process that computes for a site
TURN = 0.01  # seconds after which it is looked again who has had too much
NOT_USED = 0.1  # seconds of a core that a client which waited may make up for


class Slowed:
    """Gives the working process of each site its part of a core.

    Attributes:
        started: whether processes are slowed yet: importing libraries is not part of a round.
    """

    def __init__(self, sites: dict[str, Path], parts: dict[str, float]):
        self.started = threading.Event()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._slow, args=(kit, parts[name])) for name, kit in sites.items()]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        self.started.set()
        for thread in self._threads:
            thread.join()

    def _slow(self, kit: Path, part: float) -> None:
        self.started.wait()
        while not self._over.is_set():
            worker = _worker(kit)
            with contextlib.suppress(psutil.NoSuchProcess):
                self._give(worker, part) if worker is not None else self._over.wait(0.2)

    def _give(self, worker: psutil.Process, part: float) -> None:
        allowed, had, last, stopped = 0.0, _used(worker), time.monotonic(), False
        try:
            while not self._over.wait(TURN):
                used, now = _used(worker), time.monotonic()
                allowed = min(NOT_USED, allowed + part * (now - last)) - (used - had)
                had, last = used, now
                if stopped != (allowed < 0):
                    stopped = allowed < 0
                    worker.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)
        finally:
            worker.send_signal(signal.SIGCONT)


def _worker(kit: Path) -> psutil.Process | None:
    """The process of a site that computes."""
    node = running(kit)
    for process in node.children(recursive=True) if node is not None else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            if WORKER in " ".join(process.cmdline()):
                return process
    return None


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def points(
    data: Path, folder: Path, task: str, seed: int, method: str, stage: dict[str, Any]
) -> list[tuple[float, float, float]]:
    """Runs a method over FLARE; after every round: real seconds, modeled seconds, held-out loss in nats a token."""
    from federated import MODEL, Lines, Running
    from small import Small

    lines, held = tune.held_out(task, data, folder, validate=False)
    files = tune.deal(task, lines, folder, seed, CLIENTS)
    job = tune.job(task, method, [[file] for file in files], 0, held, seed, clients=CLIENTS, **stage)
    (folder / "small").mkdir()
    small = Small(folder / "small")
    small.model = tune.MODEL
    names = [client.name for client in job.clients]
    federation = Running(small, folder / "kits", names)
    for client in job.clients:
        keys = client.model_dump(mode="json", exclude_none=True, include={"text", "memory", "speed", "uplink", "downlink"})
        federation.describe(client.name, data=[str(file) for file in client.data], **keys)
    slowed = Slowed(federation.sites, {client.name: CORES * client.speed for client in job.clients})
    found: list[tuple[float, float, float]] = []
    spent, since, modeled = 0.0, 0.0, 0.0

    class Timed(Lines):
        def on_event(self, event: Event) -> None:
            nonlocal spent, since, modeled
            super().on_event(event)
            if isinstance(event, Phase) and event.stage is not None:
                slowed.started.set()
            if not isinstance(event, Measured) or event.client is not None:
                return
            if event.name == "clock":
                spent, modeled = spent + event.time - since, event.value
            elif event.name == f"perplexity/{task}":
                since = event.time
                if event.stage is not None and event.round is not None:
                    found.append((spent, modeled, math.log(event.value)))
                    print(method, *(f"{value:.3f}" for value in found[-1]), flush=True)

    path = {"PYTHONPATH": str(tune.ROOT / "src")}
    try:
        federation.start(server=path, **dict.fromkeys(names, path))
        tables = job.model_dump(mode="json", exclude_none=True)
        wanted = {key: tables[key] for key in ("seed", "stages", "evaluate")}
        error = federation.run("slowed", Timed(), model={"path": MODEL}, **wanted)
        assert error is None, error
    finally:
        slowed.close()
        federation.close()
    return found


def main() -> None:
    """Runs both methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with newsgroups, medquad and e2e")
    parser.add_argument("--task", choices=sorted(tune.TEXTS), default="medquad")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setting", type=int, choices=range(len(tune.GRID)), default=3, help="place in the grid")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    args = parser.parse_args()
    logging.set_verbosity_error()
    sys.path.insert(0, str(tune.ROOT / "tests"))
    rows = ["| task | method | after each round: seconds (modeled), loss |", "|---|---|---|"]
    for method in ("fedpipe", "uniform"):
        (stage,) = tune.settings_of(method, {}, [args.setting])
        with tempfile.TemporaryDirectory() as folder:
            found = points(args.data.resolve(), Path(folder), args.task, args.seed, method, stage)
        after = "; ".join(f"{seconds:.0f} s ({modeled:.1f} s), {loss:.3f}" for seconds, modeled, loss in found)
        rows.append(f"| {args.task} | {tune.named({**stage, 'method': method, 'without': ''})} | {after} |")
    table = "\n".join(rows)
    print(table)
    if args.write:
        page.write("slowed", table)


if __name__ == "__main__":
    main()
