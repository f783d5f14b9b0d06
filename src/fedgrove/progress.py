"""What a run tells while it goes on. A run speaks to a :class:`Listener`; only this file knows of terminals."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

NAMED = 4  # clients that are waited for and named; the others are counted
QUIET = 15.0  # seconds after which plain lines say again what goes on
SHORT = 2.0  # seconds that a command may take without saying anything


class Listener:
    """Gets every event of a run. This one keeps silent: a subclass takes what it can use."""

    def say(self, line: str) -> None:
        """Something that is to be read afterwards too: a client that failed, or was left out."""

    def step(self, what: str, done: float = 0, of: float = 0) -> None:
        """What begins now, or goes on: ``done`` of the ``of`` steps of its kind lie behind it; 0 of 0: nobody knows."""

    def asking(self, clients: Sequence[str]) -> None:
        """These clients are asked for their part in the step."""

    def asked(self, client: str, num_bytes: int) -> None:
        """A message went to a client."""

    def answered(self, client: str, num_bytes: int) -> None:
        """A client's answer came; 0 bytes: it failed."""

    def measured(self, line: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``; see :meth:`fedgrove.runfolder.Run.log`."""

    def close(self) -> None:
        """The run ended, well or not."""

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Several(Listener):
    """Hands every event to several watches."""

    def __init__(self, watches: Sequence[Listener]):
        self._watches = tuple(watches)

    def say(self, line: str) -> None:
        for watch in self._watches:
            watch.say(line)

    def step(self, what: str, done: float = 0, of: float = 0) -> None:
        for watch in self._watches:
            watch.step(what, done, of)

    def asking(self, clients: Sequence[str]) -> None:
        for watch in self._watches:
            watch.asking(clients)

    def asked(self, client: str, num_bytes: int) -> None:
        for watch in self._watches:
            watch.asked(client, num_bytes)

    def answered(self, client: str, num_bytes: int) -> None:
        for watch in self._watches:
            watch.answered(client, num_bytes)

    def measured(self, line: Mapping[str, Any]) -> None:
        for watch in self._watches:
            watch.measured(line)

    def close(self) -> None:
        for watch in self._watches:
            watch.close()


class Within(Listener):
    """Hands on what a part of a run tells, under the part's name; but its measurements, which stand in its own folder."""

    def __init__(self, watch: Listener, name: str):
        self._watch, self._name = watch, name

    def say(self, line: str) -> None:
        self._watch.say(f"{self._name}: {line}")

    def step(self, what: str, done: float = 0, of: float = 0) -> None:
        self._watch.step(f"{self._name}: {what}", done, of)

    def asking(self, clients: Sequence[str]) -> None:
        self._watch.asking(clients)

    def asked(self, client: str, num_bytes: int) -> None:
        self._watch.asked(client, num_bytes)

    def answered(self, client: str, num_bytes: int) -> None:
        self._watch.answered(client, num_bytes)


class _Shown(Listener):
    """What both kinds of display know: where the run is, whom it waits for, bytes, time left.

    A thread of its own looks after the display, for the run may be busy for minutes between two events.

    Args:
        delay: seconds before anything is shown: what ends sooner says nothing.
        clock: seconds from any start.
    """

    TICK = 0.25  # seconds between two looks

    def __init__(self, delay: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._delay = delay
        self._began = clock()
        self._what = ""
        self._since = self._began  # when ``what`` began
        self._done, self._of = 0.0, 0.0
        self._start, self._first = self._began, 0.0  # when this kind of step began, and with how many behind it
        self._clients = 0  # that are asked now
        self._told: set[str] = set()  # of them, those that answered
        self._out: dict[str, float] = {}  # those that have not, since when
        self._bytes = 0
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="fedgrove-progress", daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self, what: str, done: float = 0, of: float = 0) -> None:
        with self._lock:
            now = self._clock()
            if of != self._of or done < self._done or what.partition(":")[0] != self._what.partition(":")[0]:
                self._start, self._first, self._bytes = now, done, 0
            new = what != self._what
            if new or done != self._done:
                self._clients, self._told = 0, set()
            self._what, self._done, self._of = what, done, of
            if new:
                self._since = now
                self._begins()

    def asking(self, clients: Sequence[str]) -> None:
        with self._lock:
            self._clients, self._told = len(clients), set()
            self._out.clear()

    def asked(self, client: str, num_bytes: int) -> None:
        with self._lock:
            self._out[client] = self._clock()
            self._bytes += num_bytes

    def answered(self, client: str, num_bytes: int) -> None:
        with self._lock:
            self._out.pop(client, None)
            self._told.add(client)
            self._bytes += num_bytes

    def _begins(self) -> None:
        """A new step."""

    def tick(self) -> None:
        """A quarter of a second went by."""

    def _look(self) -> None:
        while not self._over.wait(self.TICK):
            with self._lock:
                if self._clock() - self._began >= self._delay:
                    self.tick()

    def _fraction(self) -> float | None:
        """Of this kind of step, counting the clients that have answered; None: nobody knows."""
        if not self._of:
            return None
        part = len(self._told) / self._clients if self._clients else 0.0
        return min(1.0, (self._done + part) / self._of)

    def _left(self) -> float | None:
        """Seconds, if what is left goes on as it went; None where it is too early to say."""
        fraction, passed = self._fraction(), self._clock() - self._start
        if fraction is None or passed < SHORT or fraction * self._of <= self._first:
            return None
        return passed * (1 - fraction) / (fraction - self._first / self._of)

    def _facts(self) -> list[str]:
        """Bytes and time left, as far as there is something to say."""
        left = self._left()
        facts = [f"{self._bytes / 1e6:,.1f} MB moved"] if self._bytes >= 50_000 else []
        return facts + ([f"{_duration(left)} left"] if left is not None else [])

    def _waiting(self) -> str:
        """Whom the run waits for, and how long."""
        if not self._out:
            return ""
        names = sorted(self._out)
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        passed = self._clock() - min(self._out.values())
        return f"waiting for {', '.join(names[:NAMED])}{more} ({_duration(passed)})"


class Lines(_Shown):
    """Plain lines: one for each step, and one where nothing was said for a while."""

    def __init__(
        self, file: TextIO | None = None, delay: float = 0.0, quiet: float = QUIET, clock: Callable[[], float] = time.monotonic
    ):
        super().__init__(delay, clock)
        self._file = file
        self._quiet = quiet
        self._spoke = self._began
        self._pending = False  # the step was not yet shown

    def say(self, line: str) -> None:
        with self._lock:
            self._write(line)

    def _begins(self) -> None:
        self._pending = True
        if self._clock() - self._began >= self._delay:
            self._show()

    def tick(self) -> None:
        if self._pending:
            self._show()
        elif self._what and self._clock() - self._spoke >= self._quiet:
            state = [self._waiting()] if self._out else [f"for {_duration(self._clock() - self._since)}"]
            fraction = self._fraction()
            state += [f"{fraction:.0%}"] if fraction else []
            self._write(f"{self._what}: {', '.join(state + self._facts())}")

    def _show(self) -> None:
        facts = self._facts()
        self._write(self._what + (f" ({', '.join(facts)})" if facts else ""))
        self._pending = False

    def _write(self, line: str) -> None:
        self._spoke = self._clock()
        print(line, file=self._file or sys.stderr, flush=True)


class Bar(_Shown):
    """One or two lines at the foot of a terminal that change; what is said stands above them."""

    def __init__(self, console: Console, delay: float = 0.0, clock: Callable[[], float] = time.monotonic):
        super().__init__(delay, clock)
        self._console = console
        self._spinner = Spinner("dots")
        self._live = Live(self, console=console, auto_refresh=False, transient=True)

    def say(self, line: str) -> None:
        with self._lock:
            self._console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        super().close()
        self._live.stop()

    def tick(self) -> None:
        if self._what:
            self._live.start()
            self._live.refresh()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            fraction = self._fraction()
            grid = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=1.0, completed=fraction, width=24) if fraction is not None else Text("")
            percent = f"{fraction:3.0%}" if fraction is not None else _duration(self._clock() - self._since)
            grid.add_row(self._spinner, Text(self._what), bar, Text(percent), Text(" ".join(self._facts()), style="dim"))
            yield grid
            if self._out:
                yield Text(f"  {self._waiting()}", style="dim")


def watch(quiet: bool = False, delay: float = SHORT) -> Listener:
    """The watch of a command: a bar on a terminal, plain lines elsewhere, on standard error; nothing with ``quiet``.

    Args:
        delay: see :class:`Bar`; a command that says what it does from its beginning gives 0.
    """
    if quiet:
        return Listener()
    console = Console(stderr=True)
    return Bar(console, delay) if console.is_terminal else Lines(delay=delay)


def part_of(watch: Listener, what: str, number: int, of: int) -> Callable[[float, float], None]:
    """To be told of the parts of the ``number``-th of so many steps: given (done, whole), it tells the watch."""
    return lambda done, whole: watch.step(what, number + done / whole, of)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
