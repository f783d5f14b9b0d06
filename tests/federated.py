"""A real federation on this machine: a server and three sites, each a process, mTLS on the loopback address."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from fedgrove.deploy.flare import kits, node, operator
from fedgrove.deploy.flare.files import FEDERATION, Federation, read
from fedgrove.events import Event, Listener, Message, Phase, Responded
from small import CLIENTS, Small, cli, forked_jobs, wait_until

OPERATOR = "ops@example.org"
MODEL = "small-model"
LONGEST = 900.0  # seconds for a run, on however busy a machine


class Lines(Listener):
    """Keeps messages and phases, and calls something once: at a phase, at a message, at a client's response.

    Attributes:
        messages: their texts.
        phases: in order.
        at_phase: by the phase's message; at_message: by words of the text; at_response: by client.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.phases: list[Phase] = []
        self.at_phase: dict[str, Any] = {}
        self.at_message: dict[str, Any] = {}
        self.at_response: dict[str, Any] = {}

    def on_event(self, event: Event) -> None:
        match event:
            case Message(text):
                self.messages.append(text)
                for words in [words for words in self.at_message if words in text]:
                    self.at_message.pop(words)()
            case Phase():
                self.phases.append(event)
                if event.message in self.at_phase:
                    self.at_phase.pop(event.message)()
            case Responded(client, num_bytes) if num_bytes and client in self.at_response:  # 0: the client failed
                self.at_response.pop(client)()

    def has_phase(self, message: str) -> bool:
        """Whether the run told of a phase with that message."""
        return any(phase.message == message for phase in self.phases)


class Proxy:
    """A way to the server that can be cut, as a network can: open connections break, no new one gets through.

    Attributes:
        passed: every byte that went through, either way: what somebody on the line would have.
    """

    def __init__(self, port: int):
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.passed = bytearray()
        self._open: list[socket.socket] = []
        self._up = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._up = False
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def restore(self) -> None:
        self._up = True

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target)) if self._up else None
                except OSError:
                    far = None
                if far is None:
                    near.close()
                    continue
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                self.passed += data
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Running:
    """A federation, its kits and its processes."""

    def __init__(self, small: Small, folder: Path, names: Sequence[str] = CLIENTS, proxied: str | None = None, **server: Any):
        self.small, self.folder, self.names = small, folder, tuple(names)
        self.port = free_port()
        self.proxy = Proxy(self.port) if proxied else None
        self._proxied = proxied
        self.file(self.names)
        self.described = read(folder / FEDERATION, Federation)
        kits.make_kits(self.described, folder)
        self.server, self.operator = folder / "server", folder / "operators" / OPERATOR
        self.write(self.server / "server.toml", threads=1, models={MODEL: str(small.model)}, **server)
        for name in names:
            self.describe(name)

    @property
    def sites(self) -> dict[str, Path]:
        """The kit of every site that has one."""
        return {kit.name: kit for kit in sorted((self.folder / "sites").iterdir())}

    def file(self, names: Sequence[str]) -> None:
        """Writes federation.toml."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sites = [{"name": name} for name in names]
        for site in sites:
            if self.proxy and site["name"] == self._proxied:
                site["connect"] = f"localhost:{self.proxy.port}"
        server = {"host": "localhost", "port": self.port}
        self.write(self.folder / FEDERATION, name="trial", server=server, sites=sites, operators=[{"name": OPERATOR}])

    def kits(self, *options: str) -> str:
        """Runs `fedgrove federation kits`, and gives what it prints."""
        status, out, _ = cli("federation", "kits", self.folder / FEDERATION, "--out", self.folder, *options)
        assert status == 0
        return out

    def write(self, file: Path, **content: Any) -> None:
        file.write_text(tomli_w.dumps(content), encoding="utf-8")

    def describe(self, site: str, **changes: Any) -> None:
        """Writes a site's own file."""
        text = self.small.texts.get(site, self.small.texts["ash"])
        content = {"data": [str(text)], "threads": 1, "models": {MODEL: str(self.small.model)}}
        self.write(self.sites[site] / "site.toml", **{**content, **changes})

    def start(self, **environments: dict[str, str]) -> None:
        """Starts everybody, and waits until the server has heard of all."""
        with environment(**environments.get("server", {})):
            node.start(self.server)
        for name in self.names:
            self.start_site(name, **environments.get(name, {}))
        self.wait_for(self.names)

    def start_site(self, name: str, **changes: str) -> None:
        with environment(**changes):
            node.start(self.sites[name])

    def wait_for(self, sites: Sequence[str], since: float = 0) -> None:
        """Waits until the server has heard of them, after a time (seconds since 1970)."""
        with operator.session(self.operator) as flare:

            def heard() -> bool:
                times = {client.name: client.last_connect_time for client in flare.get_system_info().client_info}
                return all(times.get(site, 0) > since for site in sites)

            wait_until(heard, pause=0.5)  # every question takes the server's time as well

    def job(self, name: str, **changes: Any) -> Path:
        """Writes a job for the federation."""
        spec = {**self.small.spec(**{"clients": None, "model__path": MODEL, **changes}), "name": name}
        file = self.folder / f"{name}.toml"
        self.write(file, **spec)
        return file

    def run(self, name: str, seen: Lines | None = None, resume: bool = False, **changes: Any) -> str | None:
        """Submits a job and watches it to its end; None where it ended well, else the line that says why not."""
        with within(LONGEST):
            operator.submit(self.operator, self.job(name, **changes), resume=resume)
            return operator.watch(self.operator, name, seen or Lines())

    def fetch(self, name: str) -> Path:
        """The run folder of a run, over the network."""
        return operator.fetch(self.operator, name, self.folder / f"fetched-{name}-{free_port()}")

    def kill(self, kit: Path) -> None:
        """SIGKILL to a kit's process and everything that it started: as if its machine lost power."""
        process = node.running(kit)
        assert process is not None
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(10)

    def close(self) -> None:
        """Ends every process, whatever a test left."""
        for kit in [*self.sites.values(), self.server]:
            process = node.running(kit)
            if process is not None:
                self.kill(kit)
        for one in psutil.process_iter(["cmdline"]):  # a job's process whose parent was killed
            if any(str(self.folder) in part for part in one.info["cmdline"] or ()) and one.pid != os.getpid():
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        if self.proxy:
            self.proxy.close()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """A test that never ends would leave a federation running."""

    def late(*_: Any) -> None:
        pytest.fail(f"nothing came of it in {seconds} s")  # no Exception, which FLARE's callers would catch

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def environment(**changes: str) -> Iterator[None]:
    """What the kits' processes are started with."""
    before = dict(os.environ)
    os.environ.update({"PYTHONPATH": forked_jobs(), "OMP_NUM_THREADS": "1", **changes})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
