"""Progress of a run, as events with fields. A :class:`Listener` receives them.

>>> class Printer(Listener):
...     def on_event(self, event: Event) -> None:
...         if isinstance(event, Phase):
...             print(f"{event.message} ({event.done:.0f} of {event.total:.0f} done)")
>>> with Within(Printer(), "centralized") as listener:
...     listener.on_event(Phase("prune", stage=0, round=1, rounds=2, block=2, blocks=8))
centralized: prune: round 2 of 2, block 3 of 8 (10 of 16 done)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict, TypeAdapter, ValidationError

MAX_TEXT = 2000  # characters of a string that came over a network; the rest is cut off
MAX_CLIENTS = 10_000  # in one event that came over a network


def printable(text: str) -> str:
    """A text from a network on one line, without control characters: a server must not steer an operator's terminal."""
    return "".join(char if char.isprintable() else " " for char in text[:MAX_TEXT])


# The constraints hold for what from_json reads; a constructor does not check them.
Text = Annotated[str, Strict(), AfterValidator(printable)]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Amount = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]

OnProgress = Callable[[float, float], None]  # called with (done, total) while a piece of work goes on


@dataclass(frozen=True)
class Phase:
    """What begins now, or goes on.

    Attributes:
        action: what is done, as a short identifier: "plan", "evaluate", a stage's kind such as "prune", …
        detail: the same in more words, for people.
        title: for people, in place of ``action``.
        stage: the stage's index.
        round, rounds: the round's index, and how many there are; likewise ``block``, ``blocks``. Counted from 0.
        client: whose part this is, where it is one client's.
        text: the held-out text that is measured on.
        done, total: so much of the work of this action is done, of so much; a total of 0: unknown. Where no total is given
            it follows from rounds and blocks.
        within: the names of the runs of which this run is a part; see :class:`Within`.
    """

    action: Text
    detail: Text = ""
    title: Text = ""
    stage: Count | None = None
    round: Count | None = None
    rounds: Count | None = None
    block: Count | None = None
    blocks: Count | None = None
    client: Text | None = None
    text: Text | None = None
    done: Amount = 0.0
    total: Amount = 0.0
    within: Annotated[tuple[Text, ...], Field(max_length=8)] = ()

    def __post_init__(self) -> None:
        if self.total or not (self.rounds or self.blocks):
            return
        per_round = self.blocks or 1
        object.__setattr__(self, "done", float((self.round or 0) * per_round + (self.block or 0)))
        object.__setattr__(self, "total", float((self.rounds or 1) * per_round))

    @property
    def message(self) -> str:
        """The line for people: "prune: round 1 of 2, block 3 of 8"."""
        places = [
            f"{name} {index + 1}" + (f" of {number}" if number else "")
            for name, index, number in (("round", self.round, self.rounds), ("block", self.block, self.blocks))
            if index is not None
        ]
        words = [", ".join([self.detail, *places] if self.detail else places), f"on {self.text}" if self.text else ""]
        return ": ".join(filter(None, [*self.within, self.title or self.action, " ".join(filter(None, words))]))


@dataclass(frozen=True)
class Message:
    """A line to be read afterwards too: a client that failed, or was left out."""

    text: Text


@dataclass(frozen=True)
class Requesting:
    """These clients are about to be sent a request."""

    clients: Annotated[tuple[Text, ...], Field(max_length=MAX_CLIENTS)]


@dataclass(frozen=True)
class Requested:
    """A request went to a client."""

    client: Text
    num_bytes: Count


@dataclass(frozen=True)
class Responded:
    """A client's response came; 0 bytes: the client failed."""

    client: Text
    num_bytes: Count


@dataclass(frozen=True)
class Measured:
    """A line of ``metrics.jsonl``.

    Attributes:
        time: seconds since 1970.
        stage: None: the model that the run began with.
        round: counted from 0; None: after the stage's last one.
        client: None: the federation's.
        name: what was measured, such as ``perplexity/TEXT``.
    """

    time: Annotated[float, Strict()]
    stage: Count | None
    round: Count | None
    client: Text | None
    name: Text
    value: Annotated[float, Strict()]  # not a number where a model is beyond repair


Event = Phase | Message | Requesting | Requested | Responded | Measured

_ADAPTERS: dict[str, TypeAdapter[Event]] = {
    kind.__name__.lower(): TypeAdapter(kind) for kind in (Phase, Message, Requesting, Requested, Responded, Measured)
}


def to_json(event: Event) -> dict[str, Any]:
    """An event as plain JSON: its fields, and its type's name in lower case as "event"."""
    return {"event": type(event).__name__.lower(), **asdict(event)}


def from_json(value: object) -> Event | None:
    """The event that :func:`to_json` wrote, as it came over a network.

    Fields that are not known here are passed over, strings are cut to ``MAX_TEXT`` and hold no control characters.

    Returns:
        None where it is no event that is known here: of another kind (the other fedgrove may be newer), or with a field that
        is missing or of a wrong type.
    """
    if not isinstance(value, dict) or not isinstance(value.get("event"), str) or value["event"] not in _ADAPTERS:
        return None
    try:
        return _ADAPTERS[value["event"]].validate_python({key: part for key, part in value.items() if key != "event"})
    except ValidationError:
        return None


class Listener:
    """Gets every event of a run. This one does nothing with it."""

    def on_event(self, event: Event) -> None:
        """Called for every event, in order, by the thread that runs the job."""

    def close(self) -> None:
        """The run ended, well or not."""

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Several(Listener):
    """Hands every event to several listeners."""

    def __init__(self, listeners: Sequence[Listener]):
        self._listeners = tuple(listeners)

    def on_event(self, event: Event) -> None:
        for listener in self._listeners:
            listener.on_event(event)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


class Within(Listener):
    """Hands on the events of a run that is a part of another, under the part's name.

    Its measurements are not handed on: they are in its own run folder.
    """

    def __init__(self, listener: Listener, name: str):
        self._listener, self._name = listener, name

    def on_event(self, event: Event) -> None:
        if isinstance(event, Phase):
            event = replace(event, within=(self._name, *event.within))
        elif isinstance(event, Message):
            event = Message(f"{self._name}: {event.text}")
        if not isinstance(event, Measured):
            self._listener.on_event(event)


def announce(listener: Listener, phase: Phase) -> OnProgress:
    """Tells a listener of a phase.

    Returns:
        What to call with (done, total) of this one step as it goes on; the listener then hears of the phase again, with the
        fraction added to ``phase.done``.
    """
    listener.on_event(phase)
    return lambda done, total: listener.on_event(replace(phase, done=phase.done + done / total))
