"""A persistent process that does heavy work for this one. If it is killed, this process gets an error and continues."""

from __future__ import annotations

import os
import pkgutil
import signal
import threading
from collections.abc import Callable
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

Reply = tuple[bytes | None, str | None]  # a response or an error


class WorkerDied(Exception):
    """A worker process ended before it returned a result.

    Attributes:
        status: its exit status; negative: minus the number of the signal that killed it.
    """

    def __init__(self, status: int | None):
        super().__init__(status)
        self.status = status


class Worker:
    """A process that executes one call at a time and is restarted if it dies.

    Args:
        function: the function that it calls, at the top level of a module, so that it can be pickled; or its name,
            MODULE:FUNCTION, so that this process does not import the module.
        threads: number of threads for linear algebra; some results depend on it.
        first_to_die: if memory runs out, the system kills this process before any other of this user (Linux only).
    """

    def __init__(self, function: Callable[..., Reply] | str, threads: int, *, first_to_die: bool = False):
        self._arguments = (function, threads, first_to_die)
        self._start()

    def _start(self) -> None:
        spawn = get_context("spawn")
        self.pipe, worker_end = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(worker_end, *self._arguments), name="fedgrove-client", daemon=True)
        main_thread = threading.current_thread() is threading.main_thread()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if main_thread else None
        try:  # SIGINT stays blocked in the worker until it has set its own handler
            self._process.start()
        finally:
            if mask is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        worker_end.close()

    def send(self, *arguments: Any) -> None:
        """Calls the function with these arguments, which are pickled; :meth:`receive` returns the result."""
        try:
            self.pipe.send(arguments)
        except OSError:  # the process died between two calls
            self.restart()
            self.pipe.send(arguments)

    def receive(self) -> Reply:
        """Waits for the function's result and returns it.

        Raises:
            WorkerDied: the process ended; a new one has been started already.
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
        """Kills the process and starts a new one."""
        self.stop()
        self._start()

    def stop(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _work(pipe: Any, function: Callable[..., Reply] | str, threads: int, first_to_die: bool) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # without a traceback: the parent reports the interrupt
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    oom = Path("/proc/self/oom_score_adj")
    if first_to_die and oom.is_file():
        oom.write_text("1000")
    torch.set_num_threads(threads)
    call = pkgutil.resolve_name(function) if isinstance(function, str) else function
    while True:
        try:
            arguments = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(call(*arguments))


def _end_with_parent() -> None:
    """Ends this process when its parent ends.

    A killed run may be continued at once; then no old process may still write to the clients' folders.
    """
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
