"""Events: the lines that people see, and the way through JSON to another machine."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from fedgrove.escape import MAX_TEXT
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
    from_json,
    to_json,
)

EVENTS: list[Event] = [
    Phase("prune", stage=0, round=0, rounds=2, block=2, blocks=8),
    Phase("evaluate", "what ash would have had alone", stage=0, client="ash", done=1.5, total=3),
    Phase("write", title="writing the model", within=("outer", "inner")),
    Message("birch: its process died (status -9)"),
    Requesting(("ash", "birch")),
    Requesting(()),
    Requested("ash", 2**40),
    Responded("ash", 0),
    Measured(1.7e9, None, None, None, "perplexity/held-0", 12.5),
    Measured(1.7e9, 1, 0, "ash", "loss", math.inf),
]


class Kept(Listener):
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("phase", "message", "done", "total"),
    [
        (Phase("prune", stage=0, round=0, rounds=2, block=2, blocks=8), "prune: round 1 of 2, block 3 of 8", 2, 16),
        (Phase("prune", stage=0, round=1, rounds=2, block=2, blocks=8), "prune: round 2 of 2, block 3 of 8", 10, 16),
        (Phase("structured", stage=0, block=7, blocks=8), "structured: block 8 of 8", 7, 8),
        (Phase("tune", "asking", stage=0, round=1, rounds=3), "tune: asking, round 2 of 3", 1, 3),
        (Phase("send", title="sending the model", block=0, blocks=4), "sending the model: block 1 of 4", 0, 4),
        (Phase("evaluate", "the dense model", text="a", done=1, total=2), "evaluate: the dense model on a", 1, 2),
        (Phase("evaluate", round=1, text="a", done=0, total=2), "evaluate: round 2 on a", 0, 2),
        (Phase("write", title="writing the model"), "writing the model", 0, 0),
        (Phase("write", within=("one", "two")), "one: two: write", 0, 0),
    ],
)
def test_a_phase_has_a_line_for_people_and_knows_how_much_is_done(
    phase: Phase, message: str, done: float, total: float
) -> None:
    assert (phase.message, phase.done, phase.total) == (message, done, total)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_the_way_through_json(event: Event) -> None:
    assert from_json(json.loads(json.dumps(to_json(event)))) == event


def test_not_a_number_survives_too() -> None:
    event = from_json(json.loads(json.dumps(to_json(Measured(1.0, 0, None, None, "perplexity/a", math.nan)))))
    assert isinstance(event, Measured)
    assert math.isnan(event.value)


GOOD: dict[str, dict[str, Any]] = {
    "phase": {"event": "phase", "action": "prune"},
    "message": {"event": "message", "text": "a"},
    "requesting": {"event": "requesting", "clients": ["ash"]},
    "responded": {"event": "responded", "client": "ash", "num_bytes": 1},
    "measured": {"event": "measured", "time": 1.0, "stage": 0, "round": None, "client": None, "name": "loss", "value": 2},
}


@pytest.mark.parametrize(
    "value",
    [
        None,
        "message",
        ["message", ["a"]],
        {},
        {"text": "a"},
        {"event": "unheard-of", "text": "a"},
        {"event": ["message"], "text": "a"},
        {"event": "listener"},
        {"event": "on_event"},
        {"event": "message"},
        {**GOOD["message"], "text": 7},
        {**GOOD["message"], "text": None},
        {**GOOD["message"], "text": b"a"},
        {**GOOD["phase"], "action": ["prune"]},
        {**GOOD["phase"], "stage": "0"},
        {**GOOD["phase"], "stage": True},
        {**GOOD["phase"], "stage": -1},
        {**GOOD["phase"], "round": 0.5},
        {**GOOD["phase"], "blocks": 10**30},
        {**GOOD["phase"], "done": "1"},
        {**GOOD["phase"], "done": -1.0},
        {**GOOD["phase"], "done": math.nan},
        {**GOOD["phase"], "total": math.inf},
        {**GOOD["phase"], "within": "outer"},
        {**GOOD["phase"], "within": ["part"] * 1000},
        {**GOOD["requesting"], "clients": "ash"},
        {**GOOD["requesting"], "clients": [1]},
        {**GOOD["requesting"], "clients": ["ash"] * 100_000},
        {**GOOD["responded"], "num_bytes": -1},
        {**GOOD["responded"], "num_bytes": None},
        {**GOOD["measured"], "value": "2"},
        {**GOOD["measured"], "stage": 0.0},
    ],
    ids=repr,
)
def test_what_is_no_event_is_refused(value: object) -> None:
    assert all(from_json(good) is not None for good in GOOD.values())
    assert from_json(value) is None


def test_a_newer_server_may_say_more() -> None:
    assert from_json({**GOOD["phase"], "color": "green"}) == Phase("prune")


def test_text_from_a_network_is_short_and_leaves_the_terminal_alone() -> None:
    text = "birch: \x1b[2J\x07\r\nall\u202e is well " + "x" * 10**6
    event = from_json({"event": "message", "text": text})
    assert isinstance(event, Message)
    assert event.text.startswith(r"birch: \x1b[2J\x07\r\nall\u202e is well xxx")
    assert event.text.isprintable()
    assert len(event.text) < MAX_TEXT + 30  # of escapes
    phase = from_json({"event": "phase", "action": "a\nb", "within": ["\x1b]0;title"]})
    assert isinstance(phase, Phase)
    assert phase.message == r"\x1b]0;title: a\nb"


def test_a_part_of_a_run_is_told_under_its_name_but_for_its_measurements() -> None:
    kept = Kept()
    with Within(Within(kept, "outer"), "inner") as listener:
        for event in EVENTS:
            listener.on_event(event)
    messages = [event.message if isinstance(event, Phase) else event.text for event in kept.events if hasattr(event, "text")]
    assert messages == [
        "outer: inner: prune: round 1 of 2, block 3 of 8",
        "outer: inner: evaluate: what ash would have had alone",
        "outer: inner: outer: inner: writing the model",
        "outer: inner: birch: its process died (status -9)",
    ]
    assert [event for event in kept.events if not hasattr(event, "text")] == EVENTS[4:8]
    assert not kept.closed, "the run that it is a part of goes on"


def test_several_listeners_get_every_event() -> None:
    both = Kept(), Kept()
    with Several(both) as listener:
        for event in EVENTS:
            listener.on_event(event)
    assert all(kept.events == EVENTS and kept.closed for kept in both)


def test_an_operator_passes_over_what_is_no_event_and_asks_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedgrove.deploy.flare import operator  # here, because it imports torch: the other tests need none

    join, plan, evaluate = Phase("join"), Phase("plan"), Phase("evaluate", "the dense model")
    replies: list[Any] = [
        None,
        ["no reply"],
        {"events": "none", "capabilities": 3},
        {"events": [to_json(join), {"event": "of a newer server"}, 7, {"event": "message", "text": 7}], "capabilities": {}},
        {"events": [to_json(plan), to_json(evaluate), to_json(Message("not read any more"))], "capabilities": {"ash": {}}},
    ]
    since: list[int] = []

    class Server:
        def get_job_status(self, job: str) -> str:
            return "RUNNING"

        def do_app_command(self, job: str, command: str, data: dict[str, int]) -> Any:
            since.append(data["since"])
            return replies.pop(0)

    monkeypatch.setattr(operator, "session", lambda kit: contextlib.nullcontext(Server()))
    monkeypatch.setattr(operator, "sent", lambda kit, name: "job")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    kept = Kept()
    assert operator.watch(tmp_path, "run", kept, planned=True) is None
    assert kept.events == [join, plan, evaluate]
    assert since == [0, 0, 0, 0, 4]
    assert json.loads((tmp_path / operator.CAPABILITIES).read_text()) == {"ash": {}}
