"""The default engine: clients on this machine, in this process or in worker processes."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.client.serve import serve
from fedgrove.engines.base import too_large
from fedgrove.engines.worker import Reply, Worker, WorkerDied
from fedgrove.errors import FedgroveError, first_line
from fedgrove.files import TRACE, private_files


class LocalEngine:
    """Runs clients on this machine.

    Without workers, clients respond in this process, one after the other, and the timeout has no effect. With workers,
    several clients work in parallel, each in a worker process. If one hangs or is killed, its request fails with an
    error and the worker is restarted. Results are the same bit for bit for any number of workers.

    Args:
        clients: the clients.
        workers: number of processes; 0 for none.
        devices: the devices that workers compute on, assigned in turn; default: the GPUs of this machine, else the CPU.
    """

    def __init__(self, clients: Sequence[LocalClient], workers: int = 0, devices: Sequence[str] | None = None):
        self._clients = {client.name: client for client in clients}
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        self._devices = list(devices or gpus or ["cpu"])
        self._workers = [Worker(_try, torch.get_num_threads()) for _ in range(min(workers, len(clients)))]

    @property
    def device(self) -> str:
        """The first device; the server of a run on this machine computes there too."""
        return self._devices[0]

    def clients(self) -> list[str]:
        """The clients, sorted by name."""
        return sorted(self._clients)

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        """See :meth:`fedgrove.engines.base.Engine.request`."""
        if not self._workers:
            for client in sorted(messages):
                yield client, *_try(kind, messages[client], self._clients[client], self._devices[0], largest)
            return
        ends = time.monotonic() + timeout if timeout is not None else None
        waiting = deque(sorted(messages))
        busy: dict[Any, tuple[Worker, str]] = {}
        try:
            while waiting or busy:
                for i, worker in enumerate(self._workers):
                    if waiting and worker not in [at_work for at_work, _ in busy.values()]:
                        client = waiting.popleft()
                        device = self._devices[i % len(self._devices)]
                        worker.send(kind, messages[client], self._clients[client], device, largest)
                        busy[worker.pipe] = (worker, client)
                left = None if ends is None else max(0.0, ends - time.monotonic())
                ready = connection.wait(list(busy), left)
                for pipe in ready:
                    worker, client = busy.pop(pipe)
                    yield client, *_receive(worker)
                if not ready:
                    late = [client for _, client in busy.values()] + list(waiting)
                    waiting.clear()
                    for worker, _ in busy.values():
                        worker.restart()
                    busy.clear()
                    for client in sorted(late):
                        yield client, None, f"no response in {timeout:g} s (rounds.timeout)"
        finally:
            for worker, _ in busy.values():  # the caller has stopped iterating
                worker.restart()

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()


def _receive(worker: Worker) -> Reply:
    try:
        return worker.receive()
    except WorkerDied as death:
        return None, f"its process died (status {death.status}); out of memory? Lower samples or length"


def _try(kind: str, message: bytes, client: LocalClient, device: str, largest: int | None = None) -> Reply:
    """Responds to a request; an exception becomes one line, and the trace of an unexpected one a file."""
    with private_files():
        response, error = _respond(kind, message, client, device)
    if response is not None and largest is not None and len(response) > largest:
        return None, too_large(largest)
    return response, error


def _respond(kind: str, message: bytes, client: LocalClient, device: str) -> Reply:
    try:
        return serve(kind, message, client, device), None
    except FedgroveError as error:
        return None, str(error)
    except Exception as error:
        log: Path = client.folder / TRACE
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
        if isinstance(error, OSError) and error.strerror:
            return None, f"{error.strerror}: {error.filename or client.folder}; fix that, then continue with --resume"
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return None, "out of memory; lower samples or length, or give its work to a larger machine"
        return None, f"{type(error).__name__} in its handler: {first_line(error)}; the trace is in {log}"
