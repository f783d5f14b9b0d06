"""One process forks the commands of a whole test session, so that their libraries are imported once, not in every worker.

``python forks.py SOCKET PID`` serves calls, which are pickled, until the process of that number has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import pickle
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
from filelock import FileLock

VARIABLE = "FEDGROVE_TEST_FORKS"  # the server's socket; its name is the number of the session's process
ENVIRONMENT: dict[str, str] = {}  # the server's: that of this process before a test changed it
NUMBER = struct.Struct("<i")
LONGEST = 300.0  # seconds of a command
MOST_FILES = 64  # that a process is given


def open_session() -> None:
    """Says where this session's server will be; it starts when the first command does. Workers of xdist inherit it."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = str(Path(tempfile.mkdtemp()) / str(os.getpid()))
    ENVIRONMENT.update(os.environ)


def close_session() -> None:
    """Removes the server's folder in the process that opened the session."""
    address = Path(os.environ[VARIABLE])
    if address.name == str(os.getpid()):
        shutil.rmtree(address.parent, ignore_errors=True)


def run(call: Callable[[], None], kill_after: Callable[[], None] | None = None, given: Sequence[int] = ()) -> int:
    """Runs a call in a process of its own; gives the status with which it ends, negative: the signal.

    Args:
        call: can be pickled.
        kill_after: the process is killed when this returns.
        given: open files of this process, which have the same numbers in that one.
    """
    with _connected() as server:
        socket.send_fds(server, [NUMBER.pack(len(given))], given)
        server.sendall(pickle.dumps((given, call)))
        server.shutdown(socket.SHUT_WR)
        number = _read(server)
        if kill_after:
            kill_after()
            os.kill(number, signal.SIGKILL)
        return _read(server)


def module(name: str, words: list[str], environment: dict[str, str], folder: str, waiting: int) -> None:
    """Does what ``python -m`` does, for a process that waits: with its environment, in its folder, with its output."""
    _stand_in(environment, folder, waiting)
    sys.argv = [name, *words]
    sys.modules.pop(name, None)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def spawned(code: str, environment: dict[str, str], folder: str, waiting: int) -> None:
    """Likewise what ``python -c`` does with the code that multiprocessing starts a process with."""
    _stand_in(environment, folder, waiting)
    sys.argv = ["-c", "--multiprocessing-fork"]
    exec(code, {})


def _stand_in(environment: dict[str, str], folder: str, waiting: int) -> None:
    for stream in (1, 2):
        os.dup2(os.open(f"/proc/{waiting}/fd/{stream}", os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = ["", *environment.get("PYTHONPATH", "").split(os.pathsep)]


def _take(given: Sequence[int], received: Sequence[int]) -> None:
    """Gives received files the numbers that they had where they come from."""
    apart = [fcntl.fcntl(number, fcntl.F_DUPFD, max(given) + 1) for number in received]
    for number in received:
        os.close(number)
    for number, wanted in zip(apart, given, strict=True):
        os.dup2(number, wanted)
        os.close(number)


def _read(connection: socket.socket) -> int:
    content = connection.recv(NUMBER.size, socket.MSG_WAITALL)
    assert content, "the process that forks has ended, or could not read the call"
    number: int = NUMBER.unpack(content)[0]
    return number


def start() -> Path:
    """Starts the server if no other worker has; gives its socket.

    To be called before a process that is no worker may need it: that one has other variables than the session.
    """
    if VARIABLE not in os.environ:  # outside of pytest, as in a benchmark; the server sees when this process has ended
        open_session()
    address = Path(os.environ[VARIABLE])
    with FileLock(f"{address}.lock"):
        if not address.exists():
            _start(address)
    return address


def _connected() -> socket.socket:
    address = start()
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(LONGEST)
    connection.connect(str(address))
    return connection


def _start(address: Path) -> None:
    assert ENVIRONMENT, "a process that is no worker would give the session's processes its own variables"
    here = Path(__file__)
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(here), str(address), address.name]
    log = address.with_suffix(".log")
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            env=environment,
            cwd=here.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    while not address.exists():
        assert server.poll() is None, log.read_text()
        time.sleep(0.05)


def serve(address: Path, session: int) -> None:
    """Answers every connection in a process of its own, until the session has ended or closed."""
    import warm  # noqa: F401 (what commands import)

    gc.freeze()  # the forks share these pages as long as nobody writes to them
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        listener.settimeout(1.0)
        Path(f"{address}.new").rename(address)
        while psutil.pid_exists(session) and address.exists():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    if not os.fork():
                        listener.close()
                        os._exit(_status(partial(_answer, connection)))
    shutil.rmtree(address.parent, ignore_errors=True)  # of a session that was killed


def _answer(connection: socket.socket) -> None:
    """Forks once more: this process waits for the other, and sends its number and then its status.

    Who asked may end before: then the other process is killed.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.setblocking(True)
    _, received, _, _ = socket.recv_fds(connection, NUMBER.size, MOST_FILES)
    with connection.makefile("rb") as stream:
        given, call = pickle.load(stream)
    number = os.fork()
    if not number:
        connection.close()
        if given:
            _take(given, received)
        os._exit(_status(call))
    for file in received:
        os.close(file)
    connection.sendall(NUMBER.pack(number))
    ends = select.poll()
    ends.register(os.pidfd_open(number), select.POLLIN)
    ends.register(connection, 0)  # that the other side is gone is told unasked
    if all(event & select.POLLHUP for _, event in ends.poll()):
        os.kill(number, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(NUMBER.pack(status))


def _status(call: Callable[[], None]) -> int:
    """Calls it; the status that Python would end with."""
    try:
        call()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
