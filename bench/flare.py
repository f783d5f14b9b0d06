"""What NVIDIA FLARE costs: a tiny round, 500 MB to a site and back, the server's memory over many blocks.

    .venv/bin/python bench/flare.py --write

A server and three sites are processes of this machine, over mTLS on the loopback address. For the first two, sites send
back what they receive, from the working process as in a real run; the classes that do so are here, and this federation's
kits are made to accept them. The third is a real run: a random Llama of 30 blocks is pruned by three sites.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from fedgrove.deploy.flare.controller import FedgroveController
from fedgrove.deploy.flare.executor import FedgroveExecutor
from fedgrove.deploy.flare.kits import CONTROLLER, EXECUTOR
from fedgrove.engines.flare import FlareEngine
from fedgrove.engines.worker import Reply, Worker
from fedgrove.events import Event, Phase

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 20
LARGE, LARGE_ROUNDS = 500 * 10**6, 2


def echo(kit: Path, run: str, kind: str, message: bytes, job: Path) -> Reply:
    """Sends back what came."""
    return message, None


class EchoExecutor(FedgroveExecutor):
    """A site that sends back what it receives."""

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if self._worker is None:
            self._worker = Worker(echo, 1)
        super().handle_event("" if event_type == "_about_to_start_run" else event_type, fl_ctx)


class EchoController(FedgroveController):
    """Sends requests, and writes down how long it took."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        from nvflare.app_common.utils.tensor_disk_offload_context import setup_tensor_disk_offload

        engine = fl_ctx.get_engine()
        setup_tensor_disk_offload(engine, True, fl_ctx.get_job_id())
        names = [client.name for client in engine.get_clients()]
        flare = FlareEngine(self, fl_ctx, names, "bench", 60.0, lambda: bool(abort_signal.triggered), list)

        def timed(sites: list[str], size: int) -> float:
            message = os.urandom(size)
            start = time.perf_counter()
            for site, response, error in flare.request("echo", dict.fromkeys(sites, message), 300):
                assert response == message, (site, error)
            return time.perf_counter() - start

        timed(names, 100)
        seconds = {
            "tiny": [timed(names, 100) for _ in range(ROUNDS)],
            "large": [timed(names[:1], LARGE) for _ in range(LARGE_ROUNDS)],
        }
        (Path(engine.get_workspace().get_root_dir()) / "bench.json").write_text(json.dumps(seconds))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--blocks", type=int, default=30)
    arguments.add_argument("--width", type=int, default=768, help="of the model's hidden states")
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as folder:
        tiny, large = echoes(Path(folder) / "echo")
        print("seconds:", tiny, large, flush=True)
        peaks, size = memory(Path(folder) / "memory", given.blocks, given.width)
    rows = [
        "| | measured | aim |",
        "|---|---|---|",
        f"| a round with 100 bytes for each of three sites, median of {ROUNDS} | {statistics.median(tiny):.2f} s "
        f"(worst {max(tiny):.2f} s) | 0.5 s |",
        f"| 500 MB to one site and back, {LARGE_ROUNDS} times | {', '.join(f'{one:.1f} s' for one in large)} | 12 s |",
        f"| server's peak memory over {given.blocks} blocks of {size / 1e6:.0f} MB, three sites: block 2, largest, last | "
        f"{peaks[1]:.0f}, {max(peaks[1:]):.0f}, {peaks[-1]:.0f} MiB ({100 * (max(peaks[1:]) / peaks[1] - 1):+.1f} %) | 10 % |",
    ]
    table = "\n".join(rows)
    print(table)
    if given.write:
        import page

        page.write("flare", table)


def echoes(folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of tiny rounds, and of large ones."""
    from federated import Running, within
    from fedgrove.deploy.flare import operator
    from fedgrove.job.load import load_federated
    from small import Small, wait_until

    folder.mkdir()
    running = Running(Small(folder), folder / "kits")
    for kit in [running.server, *running.sites.values()]:
        resources = kit / "local" / "resources.json"
        resources.write_text(_with_echo(resources.read_text()))
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), str(ROOT / "src")])}
    try:
        with within(600):
            running.start(server=path, **dict.fromkeys(running.names, path))
            operator.write_flare_job(folder / "job", load_federated(running.job("echo"), sites=running.names), False)
            for config in (folder / "job").rglob("config_fed_*.json"):
                config.write_text(_with_echo(config.read_text()))
            with operator.session(running.operator) as flare:
                job = flare.submit_job(str(folder / "job"))
                wait_until(lambda: (running.server / "bench.json").is_file() or _ended(flare, job))
        seconds = json.loads((running.server / "bench.json").read_text())
        return seconds["tiny"], seconds["large"]
    finally:
        running.close()


def _with_echo(text: str) -> str:
    """A file of FLARE's with the classes of this file in the place of fedgrove's."""
    return text.replace(CONTROLLER, "flare.EchoController").replace(EXECUTOR, "flare.EchoExecutor")


def _ended(flare: Any, job: str) -> bool:
    time.sleep(1)
    return not str(flare.get_job_status(job)).startswith(("RUNNING", "SUBMITTED", "DISPATCHED"))


def memory(folder: Path, blocks: int, width: int) -> tuple[list[float], int]:
    """MiB that the server's process of the run held at most while each block was pruned, and bytes of a block."""
    from federated import Lines, Running
    from small import Small, make_model

    folder.mkdir()
    small = Small(folder)
    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_attention_heads": 8}
    small.model = make_model(folder / "deep", num_hidden_layers=blocks, **sizes)
    running = Running(small, folder / "kits")
    peaks: list[float] = []

    class Watching(Lines):
        def on_event(self, event: Event) -> None:
            if isinstance(event, Phase) and event.action == "prune":
                peaks.append(0.0)

    def look() -> None:
        found = None
        while not over.is_set():
            if found is None:
                found = next((one for one in psutil.process_iter(["cmdline"]) if _is_run(one, running.server)), None)
            elif peaks:
                with contextlib.suppress(psutil.NoSuchProcess):  # the run has ended
                    peaks[-1] = max(peaks[-1], found.memory_info().rss / 2**20)
            over.wait(0.05)

    over = threading.Event()
    looking = threading.Thread(target=look)
    try:
        running.start()
        looking.start()
        error = running.run("memory", Watching(), evaluate__data=[])
        assert error is None, error
    finally:
        over.set()
        running.close()
    return peaks, 2 * (2 * width * width + 2 * width * width // 4 + 3 * width * (8 * width // 3))


def _is_run(process: psutil.Process, server: Path) -> bool:
    line = process.info["cmdline"] or []
    return str(server) in line and any("runner_process" in part for part in line)


if __name__ == "__main__":
    main()
