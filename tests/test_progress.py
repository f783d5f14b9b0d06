"""What is told while a run goes on: plain lines, a bar on a terminal, nothing when quiet."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedgrove.progress import Bar, Lines, Listener, Several
from small import CLIENTS, Heard, Small, cli


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def busy(watch: Listener, clock: Clock) -> None:
    """Two blocks of four are done in ten seconds; of three clients of the third block one has answered, one is at work."""
    for block in range(3):
        watch.step(f"prune: block {block + 1} of 4", block, 4)
        watch.asking(["ash", "birch", "cedar"])
        watch.asked("ash", 10**6)
        clock.now += 5 if block < 2 else 0
        watch.answered("ash", 2 * 10**6)
    watch.asked("birch", 10**6)
    clock.now += 20


def test_plain_lines_say_each_step_and_whom_a_run_waits_for() -> None:
    out, clock = io.StringIO(), Clock()
    watch = Lines(out, quiet=15, clock=clock)
    busy(watch, clock)
    watch.tick()
    watch.say("birch: its process died")
    watch.tick()  # something was said just now
    assert out.getvalue().splitlines() == [
        "prune: block 1 of 4",
        "prune: block 2 of 4 (3.0 MB moved, 15 s left)",
        "prune: block 3 of 4 (6.0 MB moved, 10 s left)",
        "prune: block 3 of 4: waiting for birch (20 s), 58%, 10.0 MB moved, 21 s left",
        "birch: its process died",
    ]


def test_many_clients_are_counted() -> None:
    out, clock = io.StringIO(), Clock()
    watch = Lines(out, clock=clock)
    watch.step("prune: block 1 of 4", 0, 4)
    names = [f"client-{i}" for i in range(9)]
    watch.asking(names)
    for name in names:
        watch.asked(name, 10)
    clock.now = 7200.0
    watch.tick()
    assert out.getvalue().endswith("waiting for client-0, client-1, client-2, client-3 and 5 more (2.0 h)\n")


def test_what_ends_soon_says_nothing_and_what_lasts_says_what_it_does() -> None:
    out, clock = io.StringIO(), Clock()
    watch = Lines(out, delay=2, clock=clock)
    watch.step("reading the first file")
    watch.step("reading the second file")
    assert out.getvalue() == ""
    clock.now = 3.0
    watch.tick()
    watch.step("reading the third file")
    assert out.getvalue() == "reading the second file\nreading the third file\n"


def test_a_bar_shows_the_same_on_a_terminal() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=140)
    watch = Bar(console, clock=clock)
    busy(watch, clock)
    watch.tick()
    watch.say("a client [red] is left out")
    watch.close()
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


def test_a_run_tells_its_steps_and_every_client_that_it_asks(small: Small, tmp_path: Path) -> None:
    from fedgrove import run as server
    from fedgrove.job.load import load
    from fedgrove.runfolder import RunFolder

    class Clients(Listener):
        asked_of: list[str]

        def asking(self, clients: object) -> None:
            self.asked_of = []

        def asked(self, client: str, num_bytes: int) -> None:
            assert num_bytes > 0
            self.asked_of.append(client)

        def answered(self, client: str, num_bytes: int) -> None:
            assert client == self.asked_of[-1], "one after the other, where there are no workers"

    class Measured(Listener):
        names: list[str]

        def measured(self, line: object) -> None:
            assert isinstance(line, dict)
            self.names.append(line["name"])

    heard, clients, measured = Heard(), Clients(), Measured()
    measured.names = []
    job = load(small.job())
    run = RunFolder(tmp_path / "run", job, watch=Several([heard, clients, measured]))
    server.run_job(job, server.local_engine(job, run.path / "clients"), run)
    run.close()
    assert clients.asked_of == list(CLIENTS)
    assert "evaluate: the dense model on held-1" in heard.lines
    assert "writing the model" in heard.lines
    assert measured.names.count("perplexity/held-0") == 2 + len(CLIENTS)


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_every_command_that_may_take_long_can_be_quiet(small: Small, quiet: tuple[str, ...]) -> None:
    err = cli("evaluate", small.undisturbed(), "--data", small.texts["held-0"], "--length", 32, *quiet)[2]
    assert bool(err) == (not quiet)
