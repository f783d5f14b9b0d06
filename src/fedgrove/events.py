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

from fedgrove.escape import printable

MAX_CLIENTS = 10_000  # in one event from a network


# The constraints hold for what from_json reads; a constructor does not check them.
Text = Annotated[str, Strict(), AfterValidator(printable)]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Amount = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]

OnProgress = Callable[[float, float], None]  # called with (done, total) during a piece of work


@dataclass(frozen=True)
class Phase:
    """The piece of work that begins now, or continues.

    Attributes:
        action: a short identifier of the work: "plan", "evaluate", a stage's kind such as "prune", …
        detail: a description for people.
        title: shown to people instead of ``action``.
        stage: the stage's index.
        round, rounds: the round's index, and how many there are; likewise ``block``, ``blocks``. Counted from 0.
        client: the client whose work this is, if it is one client's.
        text: the held-out text on which the model is measured.
        done, total: the amount of this action's work that is done, and the total amount; a total of 0: unknown. By
            default both are computed from rounds and blocks.
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
    """A line that stays visible: a client failed, or was left out."""

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
    """A client's response arrived; 0 bytes: the client failed."""

    client: Text
    num_bytes: Count


@dataclass(frozen=True)
class Measured:
    """A line of ``metrics.jsonl``.

    Attributes:
        time: seconds since 1970.
        stage: the stage's index; None: the base model.
        round: counted from 0; None: after the stage's last round.
        client: whose model was measured; None: the federation's.
        name: what was measured, such as ``perplexity/TEXT``.
    """

    time: Annotated[float, Strict()]
    stage: Count | None
    round: Count | None
    client: Text | None
    name: Text
    value: Annotated[float, Strict()]  # can be infinite or not a number if a model is broken


Event = Phase | Message | Requesting | Requested | Responded | Measured

_ADAPTERS: dict[str, TypeAdapter[Event]] = {
    kind.__name__.lower(): TypeAdapter(kind) for kind in (Phase, Message, Requesting, Requested, Responded, Measured)
}


def to_json(event: Event) -> dict[str, Any]:
    """An event as plain JSON: its fields, and its type's name in lower case as "event"."""
    return {"event": type(event).__name__.lower(), **asdict(event)}


def from_json(value: object) -> Event | None:
    """The event that :func:`to_json` wrote, received over a network.

    Unknown fields are ignored; strings are made :func:`~fedgrove.escape.printable`.

    Returns:
        None if it is not a known event: its kind is unknown (the sender may have a newer fedgrove), or a field is
        missing or has a wrong type.
    """
    if not isinstance(value, dict) or not isinstance(value.get("event"), str) or value["event"] not in _ADAPTERS:
        return None
    try:
        return _ADAPTERS[value["event"]].validate_python({key: part for key, part in value.items() if key != "event"})
    except ValidationError:
        return None


class Listener:
    """Receives every event of a run. This base class ignores them."""

    def on_event(self, event: Event) -> None:
        """Called for every event, in order, by the thread that runs the job."""

    def close(self) -> None:
        """Called when the run has ended, successfully or not."""

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Several(Listener):
    """Passes every event to several listeners."""

    def __init__(self, listeners: Sequence[Listener]):
        self._listeners = tuple(listeners)

    def on_event(self, event: Event) -> None:
        for listener in self._listeners:
            listener.on_event(event)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


class Within(Listener):
    """Passes on the events of a run that is a part of another run, with the part's name.

    Measurements are not passed on: they are in the part's own run folder.
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
    """Sends a phase to a listener.

    Returns:
        A function to be called with (done, total) of this phase's current step; it sends the phase again, with done /
        total added to ``phase.done``.
    """
    listener.on_event(phase)
    return lambda done, total: listener.on_event(replace(phase, done=phase.done + done / total))
