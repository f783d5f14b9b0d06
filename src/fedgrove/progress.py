"""Displays the events of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedgrove.escape import printable
from fedgrove.events import Event, Listener, Message, Phase, Requested, Requesting, Responded

MOST_NAMES = 4  # pending clients that are named; further ones are counted
QUIET = 15.0  # seconds without a line after which plain lines show the current state again
SHORT = 2.0  # seconds before a command shows progress
LEAST_BYTES = 50_000  # smaller amounts are not shown


class _Display(Listener):
    """The state of both kinds of display: the phase, the pending clients, bytes, and time left.

    A separate thread refreshes the display, because minutes can pass between two events.

    Args:
        delay: seconds before anything is shown: a command that ends sooner shows nothing.
        clock: returns the current time in seconds.
    """

    TICK = 0.25  # seconds between two refreshes

    def __init__(self, delay: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._delay = delay
        self._created = clock()
        self._phase: Phase | None = None
        self._phase_start = self._created
        self._action_start, self._action_done = self._created, 0.0  # this action's start time, and how much was done then
        self._num_requested = 0  # clients that get a request in this phase
        self._responded: set[str] = set()
        self._waiting_since: dict[str, float] = {}  # clients that have not responded
        self._num_bytes = 0  # since this action began
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="fedgrove-progress", daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def on_event(self, event: Event) -> None:
        with self._lock:
            match event:
                case Phase():
                    self._on_phase(event)
                case Message(text):
                    self._on_message(printable(text))
                case Requesting(clients):
                    self._num_requested, self._responded = len(clients), set()
                    self._waiting_since.clear()
                case Requested(client, num_bytes):
                    self._waiting_since[client] = self._clock()
                    self._num_bytes += num_bytes
                case Responded(client, num_bytes):
                    self._waiting_since.pop(client, None)
                    self._responded.add(client)
                    self._num_bytes += num_bytes

    def tick(self) -> None:
        """Called every ``TICK`` seconds, once ``delay`` has passed."""

    def _on_phase(self, phase: Phase) -> None:
        now, last = self._clock(), self._phase
        if last is None or _action(phase) != _action(last) or phase.done < last.done:
            self._action_start, self._action_done, self._num_bytes = now, phase.done, 0
        begins = last is None or phase.message != last.message
        if last is None or begins or phase.done != last.done:
            self._num_requested, self._responded = 0, set()
        self._phase = phase
        if begins:
            self._phase_start = now
            self._on_new_phase()

    def _on_new_phase(self) -> None:
        """Called when the line of the phase has changed."""

    def _on_message(self, text: str) -> None:
        """Shows a line that stays visible."""

    def _refresh(self) -> None:
        while not self._closed.wait(self.TICK):
            with self._lock:
                if self._clock() - self._created >= self._delay:
                    self.tick()

    def _fraction(self) -> float | None:
        """The fraction of the action that is done, counting clients that have responded; None: unknown."""
        if self._phase is None or not self._phase.total:
            return None
        part = len(self._responded) / self._num_requested if self._num_requested else 0.0
        return min(1.0, (self._phase.done + part) / self._phase.total)

    def _seconds_left(self) -> float | None:
        """The estimated remaining time at the speed of this action so far; None: too early for an estimate."""
        fraction, passed = self._fraction(), self._clock() - self._action_start
        if self._phase is None or fraction is None or passed < SHORT or fraction * self._phase.total <= self._action_done:
            return None
        return passed * (1 - fraction) / (fraction - self._action_done / self._phase.total)

    def _facts(self) -> list[str]:
        """Bytes and time left, if known and large enough to show."""
        left = self._seconds_left()
        facts = [f"{self._num_bytes / 1e6:,.1f} MB moved"] if self._num_bytes >= LEAST_BYTES else []
        return facts + ([f"{_duration(left)} left"] if left is not None else [])

    def _waiting(self) -> str:
        """The clients that have not responded, and for how long."""
        if not self._waiting_since:
            return ""
        names = sorted(self._waiting_since)
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        passed = self._clock() - min(self._waiting_since.values())
        return f"waiting for {', '.join(names[:MOST_NAMES])}{more} ({_duration(passed)})"


class Lines(_Display):
    """Plain lines: one for each phase, and one whenever nothing was printed for ``quiet`` seconds."""

    def __init__(
        self, file: TextIO | None = None, delay: float = 0.0, quiet: float = QUIET, clock: Callable[[], float] = time.monotonic
    ):
        super().__init__(delay, clock)
        self._file = file
        self._quiet = quiet
        self._last_line = self._created
        self._pending = False  # the phase has not been shown yet

    def tick(self) -> None:
        if self._pending:
            self._show()
        elif self._phase is not None and self._clock() - self._last_line >= self._quiet:
            state = [self._waiting() or f"for {_duration(self._clock() - self._phase_start)}"]
            fraction = self._fraction()
            state += [f"{fraction:.0%}"] if fraction else []
            self._write(f"{printable(self._phase.message)}: {', '.join(state + self._facts())}")

    def _on_new_phase(self) -> None:
        self._pending = True
        if self._clock() - self._created >= self._delay:
            self._show()

    def _on_message(self, text: str) -> None:
        self._write(text)

    def _show(self) -> None:
        if self._phase is not None:
            facts = self._facts()
            self._write(printable(self._phase.message) + (f" ({', '.join(facts)})" if facts else ""))
        self._pending = False

    def _write(self, line: str) -> None:
        self._last_line = self._clock()
        print(line, file=self._file or sys.stderr, flush=True)


class Bar(_Display):
    """One or two lines at the bottom of a terminal that are updated; messages are printed above them."""

    def __init__(self, console: Console, delay: float = 0.0, clock: Callable[[], float] = time.monotonic):
        super().__init__(delay, clock)
        self._console = console
        self._spinner = Spinner("dots")
        self._live = Live(self, console=console, auto_refresh=False, transient=True)

    def close(self) -> None:
        super().close()
        self._live.stop()

    def tick(self) -> None:
        if self._phase is not None:
            self._live.start()
            self._live.refresh()

    def _on_message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            if self._phase is None:
                return
            fraction = self._fraction()
            grid = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=1.0, completed=fraction, width=24) if fraction is not None else Text("")
            percent = f"{fraction:3.0%}" if fraction is not None else _duration(self._clock() - self._phase_start)
            facts = Text(" ".join(self._facts()), style="dim")
            grid.add_row(self._spinner, Text(printable(self._phase.message)), bar, Text(percent), facts)
            yield grid
            if self._waiting_since:
                yield Text(f"  {self._waiting()}", style="dim")


def display(quiet: bool = False, delay: float = SHORT) -> Listener:
    """The display of a command, on standard error: a bar on a terminal, plain lines elsewhere; nothing with ``quiet``.

    Args:
        quiet: show nothing.
        delay: seconds before anything is shown; 0 for a command that shows progress from its start.
    """
    if quiet:
        return Listener()
    console = Console(stderr=True)
    return Bar(console, delay) if console.is_terminal else Lines(delay=delay)


def _action(phase: Phase) -> tuple[object, ...]:
    """Identifies the action for which the time left is estimated."""
    return phase.within, phase.action, phase.stage, phase.total


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
