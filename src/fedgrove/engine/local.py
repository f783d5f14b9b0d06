"""The embedded default: clients of one machine, in this process or in worker processes."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from fedgrove.client import Site, serve
from fedgrove.errors import FedgroveError

Reply = tuple[bytes | None, str | None]  # an answer or an error


class LocalEngine:
    """Calls the handlers on this machine.

    Without workers a handler runs in this process, one client after the other, and a timeout cannot stop it. With workers
    each has a process of its own: several clients work at once, one that hangs or is killed becomes an error answer and
    its worker starts anew. The bits of a result do not depend on the number of workers.

    Args:
        sites: the clients.
        workers: number of processes; 0 for none.
        devices: where workers compute, dealt in turn; default: the GPUs of this machine, else the CPU.
    """

    def __init__(self, sites: Sequence[Site], workers: int = 0, devices: Sequence[str] | None = None):
        self._sites = {site.name: site for site in sites}
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        self._devices = list(devices or gpus or ["cpu"])
        self._workers: list[_Worker] = []
        for i in range(min(workers, len(sites))):
            self._workers.append(_Worker(self._devices[i % len(self._devices)]))

    def sites(self) -> list[str]:
        """The clients, sorted by name."""
        return sorted(self._sites)

    def ask(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        """See :meth:`fedgrove.engine.Engine.ask`."""
        if not self._workers:
            for client in sorted(messages):
                yield client, *_try(kind, messages[client], self._sites[client], self._devices[0])
            return
        ends = time.monotonic() + timeout if timeout is not None else None
        waiting = deque(sorted(messages))
        busy: dict[Any, tuple[_Worker, str]] = {}
        try:
            while waiting or busy:
                for worker in self._workers:
                    if waiting and worker not in [at_work for at_work, _ in busy.values()]:
                        client = waiting.popleft()
                        worker.send(kind, messages[client], self._sites[client])
                        busy[worker.pipe] = (worker, client)
                left = None if ends is None else max(0.0, ends - time.monotonic())
                ready = connection.wait(list(busy), left)
                for pipe in ready:
                    worker, client = busy.pop(pipe)
                    yield client, *worker.receive()
                if not ready:
                    late = [client for _, client in busy.values()] + list(waiting)
                    waiting.clear()
                    for worker, _ in busy.values():
                        worker.restart()
                    busy.clear()
                    for client in sorted(late):
                        yield client, None, f"no answer in {timeout:g} s (rounds.timeout)"
        finally:
            for worker, _ in busy.values():  # whoever asked has stopped listening
                worker.restart()

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()


def _try(kind: str, message: bytes, site: Site, device: str) -> Reply:
    """Serves an ask; every failure becomes one line, and its trace stays on the client's own disk."""
    try:
        return serve(kind, message, site, device), None
    except FedgroveError as fault:
        return None, str(fault)
    except Exception as fault:
        log: Path = site.folder / "error.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
        if isinstance(fault, OSError) and fault.strerror:
            return None, f"{fault.strerror}: {fault.filename or site.folder}; mend that, then continue with --resume"
        if isinstance(fault, MemoryError) or "can't allocate memory" in str(fault):
            return None, "out of memory; lower samples or length, or give its work to a larger machine"
        return None, f"{type(fault).__name__} in its handler; the trace is in {log}"


class _Worker:
    """A process that serves one ask at a time."""

    def __init__(self, device: str):
        self._device = device
        self._start()

    def _start(self) -> None:
        spawn = get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_work, args=(theirs, self._device, torch.get_num_threads()), name="fedgrove-client", daemon=True
        )
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until it says what an interrupt shall do
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def send(self, kind: str, message: bytes, site: Site) -> None:
        try:
            self.pipe.send((kind, message, site))
        except OSError:  # it died between two asks
            self.restart()
            self.pipe.send((kind, message, site))

    def receive(self) -> Reply:
        try:
            reply: Reply = self.pipe.recv()
            return reply
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.restart()
            return None, f"its process died (status {code}); out of memory? Lower samples or length"

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _work(pipe: Any, device: str, threads: int) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the parent says what is to be said
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)  # as many as without workers: some results of linear algebra depend on it
    while True:
        try:
            kind, message, site = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(_try(kind, message, site, device))


def _end_with_parent() -> None:
    """A run that was killed may be continued at once: nobody else may still be writing to the clients' folders then."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
