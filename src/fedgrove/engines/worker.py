"""A warm process that does heavy work for this one: where it is killed, an error comes back and this process lives."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

Reply = tuple[bytes | None, str | None]  # a response or an error


class WorkerDied(Exception):
    """A process ended before it answered.

    Attributes:
        status: its exit status; negative: the signal.
    """

    def __init__(self, status: int | None):
        super().__init__(status)
        self.status = status


class Worker:
    """A process that answers one call at a time, and is started again where it dies.

    Args:
        function: what it calls: a function of a module, so that it can be named to the other process.
        threads: of linear algebra, some of whose results depend on it.
        first_to_die: where memory runs out the system ends this process before any other of this user (Linux).
    """

    def __init__(self, function: Callable[..., Reply], threads: int, *, first_to_die: bool = False):
        self._arguments = (function, threads, first_to_die)
        self._start()

    def _start(self) -> None:
        spawn = get_context("spawn")
        self.pipe, worker_end = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(worker_end, *self._arguments), name="fedgrove-client", daemon=True)
        main_thread = threading.current_thread() is threading.main_thread()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if main_thread else None
        try:  # blocked until the worker says what an interrupt shall do
            self._process.start()
        finally:
            if mask is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        worker_end.close()

    def send(self, *arguments: Any) -> None:
        """Calls the function with these arguments; they are pickled, so they are this program's own."""
        try:
            self.pipe.send(arguments)
        except OSError:  # it died between two calls
            self.restart()
            self.pipe.send(arguments)

    def receive(self) -> Reply:
        """What the function returned; waits for it.

        Raises:
            WorkerDied: the process is gone; another one is there already.
        """
        try:
            reply: Reply = self.pipe.recv()
            return reply
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.restart()
            raise WorkerDied(code) from None

    def restart(self) -> None:
        """Ends whatever it does and begins anew."""
        self.stop()
        self._start()

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _work(pipe: Any, function: Callable[..., Reply], threads: int, first_to_die: bool) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the parent tells the user
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    oom = Path("/proc/self/oom_score_adj")
    if first_to_die and oom.is_file():
        oom.write_text("1000")
    torch.set_num_threads(threads)
    while True:
        try:
            arguments = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(function(*arguments))


def _end_with_parent() -> None:
    """A run that was killed may be continued at once: nobody else may still be writing to the clients' folders then."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
