"""What is told while a run goes on: plain lines, a bar on a terminal, nothing when quiet."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedgrove.events import (
    Event,
    Listener,
    Measured,
    Message,
    Phase,
    Requested,
    Requesting,
    Responded,
    Several,
    Within,
    announce,
)
from fedgrove.progress import Bar, Lines
from small import CLIENTS, Heard, Small, cli


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def busy(listener: Listener, clock: Clock) -> None:
    """Two blocks of four are done in ten seconds; of three clients of the third block one has responded, one is at work."""
    for block in range(3):
        listener.on_event(Phase("prune", stage=0, block=block, blocks=4))
        listener.on_event(Requesting(("ash", "birch", "cedar")))
        listener.on_event(Requested("ash", 10**6))
        clock.now += 5 if block < 2 else 0
        listener.on_event(Responded("ash", 2 * 10**6))
    listener.on_event(Requested("birch", 10**6))
    clock.now += 20


def test_plain_lines_say_each_phase_and_whom_a_run_waits_for() -> None:
    out, clock = io.StringIO(), Clock()
    display = Lines(out, quiet=15, clock=clock)
    busy(display, clock)
    display.tick()
    display.on_event(Message("birch: its process died"))
    display.tick()  # a line was written just now
    assert out.getvalue().splitlines() == [
        "prune: block 1 of 4",
        "prune: block 2 of 4 (3.0 MB moved, 15 s left)",
        "prune: block 3 of 4 (6.0 MB moved, 10 s left)",
        "prune: block 3 of 4: waiting for birch (20 s), 58%, 10.0 MB moved, 21 s left",
        "birch: its process died",
    ]


def test_many_clients_are_counted() -> None:
    out, clock = io.StringIO(), Clock()
    display = Lines(out, clock=clock)
    display.on_event(Phase("prune", stage=0, block=0, blocks=4))
    names = [f"client-{i}" for i in range(9)]
    display.on_event(Requesting(tuple(names)))
    for name in names:
        display.on_event(Requested(name, 10))
    clock.now = 7200.0
    display.tick()
    assert out.getvalue().endswith("waiting for client-0, client-1, client-2, client-3 and 5 more (2.0 h)\n")


def test_what_ends_soon_says_nothing_and_what_lasts_says_what_it_does() -> None:
    out, clock = io.StringIO(), Clock()
    display = Lines(out, delay=2, clock=clock)
    display.on_event(Phase("split", title="reading the first file"))
    display.on_event(Phase("split", title="reading the second file"))
    assert out.getvalue() == ""
    clock.now = 3.0
    display.tick()
    display.on_event(Phase("split", title="reading the third file"))
    assert out.getvalue() == "reading the second file\nreading the third file\n"


def test_a_bar_shows_the_same_on_a_terminal() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=140)
    display = Bar(console, clock=clock)
    busy(display, clock)
    display.tick()
    display.on_event(Message("a client [red] is left out"))
    display.close()
    shown = out.getvalue()
    for words in (
        "prune: block 3 of 4",
        "58%",
        "10.0 MB moved",
        "21 s left",
        "waiting for birch (20 s)",
        "client [red] is left",
    ):
        assert words in shown
    assert "━" in shown


def test_the_time_left_is_that_of_one_action_of_one_run() -> None:
    out, clock = io.StringIO(), Clock()
    display = Lines(out, clock=clock)
    inner = Within(display, "centralized")
    for listener in (display, inner):
        for round_ in range(2):
            listener.on_event(Phase("tune", stage=1, round=round_, rounds=4))
            clock.now += 10
    for block in range(2):
        inner.on_event(Phase("prune", stage=2, block=block, blocks=4))
        clock.now += 5
    display.on_event(Phase("prune", stage=3, block=3, blocks=4))
    assert out.getvalue().splitlines() == [
        "tune: round 1 of 4",
        "tune: round 2 of 4 (30 s left)",
        "centralized: tune: round 1 of 4",
        "centralized: tune: round 2 of 4 (30 s left)",
        "centralized: prune: block 1 of 4",
        "centralized: prune: block 2 of 4 (15 s left)",
        "prune: block 4 of 4",
    ]


def test_a_step_that_goes_on_is_one_line_and_a_fraction() -> None:
    out, clock = io.StringIO(), Clock()
    display = Lines(out, quiet=15, clock=clock)
    on_progress = announce(display, Phase("evaluate", "the dense model", text="held-0", done=1, total=4))
    clock.now = 20.0
    on_progress(3, 6)
    display.tick()
    assert out.getvalue().splitlines() == [
        "evaluate: the dense model on held-0",
        "evaluate: the dense model on held-0: for 20 s, 38%, 2 min left",
    ]


def test_a_run_tells_its_phases_and_every_client_that_it_requests_from(small: Small, tmp_path: Path) -> None:
    from fedgrove import run as server
    from fedgrove.job.load import load
    from fedgrove.runfolder import RunFolder

    class Clients(Listener):
        requested: list[str]

        def on_event(self, event: Event) -> None:
            match event:
                case Requesting():
                    self.requested = []
                case Requested(client, num_bytes):
                    assert num_bytes > 0
                    self.requested.append(client)
                case Responded(client):
                    assert client == self.requested[-1], "one after the other, where there are no workers"

    class Measurements(Listener):
        names: list[str]

        def on_event(self, event: Event) -> None:
            if isinstance(event, Measured):
                self.names.append(event.name)

    heard, clients, measured = Heard(), Clients(), Measurements()
    measured.names = []
    job = load(small.job(evaluate__alone=True))
    run = RunFolder(tmp_path / "run", job, listener=Several([heard, clients, measured]))
    server.run_job(job, server.local_engine(job, run.path / "clients"), run)
    run.close()
    assert clients.requested == list(CLIENTS)
    assert "evaluate: the dense model on held-0" in heard.lines
    assert "writing the model" in heard.lines
    assert measured.names.count("perplexity/held-0") == 2 + len(CLIENTS)


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_every_command_that_may_take_long_can_be_quiet(small: Small, quiet: tuple[str, ...]) -> None:
    err = cli("evaluate", small.undisturbed(), "--data", small.texts["held-0"], "--length", 32, *quiet)[2]
    assert bool(err) == (not quiet)
