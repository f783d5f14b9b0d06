"""Ask clients, take their answers in a fixed order, name who failed, and go on while the quorum holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from fedgrove import heap
from fedgrove.engines.base import Engine
from fedgrove.errors import FedgroveError
from fedgrove.rounds import wire
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.wire import Info
from fedgrove.runfolder import Run

Message = tuple[Mapping[str, Tensor], Info]
Answer = tuple[str, dict[str, Tensor], Info]


def ask(
    engine: Engine,
    run: Run,
    kind: str,
    messages: Mapping[str, Message],
    *,
    stage: int,
    round_: int,
    check: Callable[[str, dict[str, Tensor], Info], None],
    clock: Clock | None = None,
) -> Iterator[Answer]:
    """Sends each client its message and yields what came back, by client name, whoever was first.

    An answer that comes before its turn waits on disk, so memory does not grow with the number of clients. A client that
    raises, does not answer in time or sends what ``check`` refuses is asked again (``rounds.retries``), then left out.

    Args:
        messages: for each client its tensors and its JSON.
        check: given client, tensors and JSON; raises :class:`~fedgrove.rounds.wire.WireError` on an answer that is not what
            was asked for.
        clock: what the messages would take on the clients' own machines; the ledger then tells it.

    Yields:
        (client, tensors, JSON).

    Raises:
        FedgroveError: fewer clients answered well than ``rounds.quorum`` (by default all); names the first that failed and
            why. It is raised after the last answer, so finish nothing before the iteration ends.
    """
    rules = run.job.rounds
    inbox = run.path / "work" / "inbox"
    turns = sorted(messages)
    held: dict[str, bytes | Path | None] = {}  # answers before their turn; None where there is none
    faults: dict[str, str] = {}  # what was wrong with a client's latest answer

    def account(client: str, direction: Literal["up", "down"], size: int) -> None:
        modelled = clock.spend(client, direction, size) if clock else {}
        run.account(stage, round_, client, direction, kind, size, modelled)

    def send(clients: list[str]) -> Iterator[Answer]:
        run.watch.asking(clients)
        heap.release_freed_memory()  # what the server worked with: a client in this process begins where it began before
        outbox = _Outbox(
            {client: messages[client] for client in clients},
            lambda client, size: account(client, "down", size),
        )
        for client, answer, error in engine.ask(kind, outbox, rules.timeout):
            if client not in turns or held.get(client) is not None:
                continue  # it comes late or twice: this client's part is settled
            heap.release_freed_memory()  # what a client in this process worked with
            if answer is not None:
                account(client, "up", len(answer))
            else:
                faults[client] = error or "it gave no answer"
                run.watch.answered(client, 0)
            if answer is not None and client != turns[0]:
                inbox.mkdir(parents=True, exist_ok=True)
                held[client] = inbox / client
                (inbox / client).write_bytes(answer)
            else:
                held[client] = answer
            del answer  # whoever takes it lets go of it as soon as it is read
            yield from take()

    def take() -> Iterator[Answer]:
        """Yields those whose turn has come; stops at one that is still out or may be asked again."""
        while turns and turns[0] in held:
            client = turns[0]
            answer = held[client]
            if isinstance(answer, Path):
                path, answer = answer, answer.read_bytes()
                path.unlink()
            if answer is not None:
                try:
                    tensors, info = wire.unpack(answer)
                    del answer  # as large as a block
                    check(client, tensors, info)
                except wire.WireError as fault:
                    faults[client] = f"its answer was refused: {fault}"
                else:
                    faults.pop(client, None)
                    del held[client], turns[0]
                    heap.release_freed_memory()  # what it took to read it
                    yield client, tensors, info
                    del tensors
                    heap.release_freed_memory()
                    continue
            held[client] = None
            if not last_try:
                return
            run.say(f"{client}: {faults[client]}")
            del held[client], turns[0]

    for attempt in range(rules.retries + 1):
        last_try = attempt == rules.retries
        unanswered = [client for client in turns if held.get(client) is None]
        for client in unanswered:
            held.pop(client, None)
        yield from send(unanswered)
    for client in turns:  # an engine that broke its word must not look like a smaller federation
        faults.setdefault(client, "it gave no answer")
    needed = min(rules.quorum or len(messages), len(messages))
    if len(messages) - len(faults) < needed:
        client, what = min(faults.items())
        what = what if what.startswith(f"client '{client}'") else f"client '{client}': {what}"
        raise FedgroveError(
            f"{what} ({len(messages) - len(faults)} of {len(messages)} clients answered, {needed} needed: rounds.quorum)"
        )


class _Outbox(Mapping[str, bytes]):
    """Messages that are packed when the engine takes them, so that memory does not grow with the number of clients."""

    def __init__(self, messages: Mapping[str, Message], sent: Callable[[str, int], None]):
        self._messages = messages
        self._sent = sent

    def __getitem__(self, client: str) -> bytes:
        message = wire.pack(*self._messages[client])
        self._sent(client, len(message))
        return message

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)
