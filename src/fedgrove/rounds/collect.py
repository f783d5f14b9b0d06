"""Sends requests, takes responses in a fixed order, names clients that failed, continues while the quorum holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from fedgrove import heap
from fedgrove.engines.base import Engine, too_large
from fedgrove.errors import FedgroveError
from fedgrove.escape import MAX_WORD, printable
from fedgrove.events import Requesting, Responded
from fedgrove.models.blocks import Decoder
from fedgrove.rounds import wire
from fedgrove.rounds.clock import Clock
from fedgrove.rounds.request import Message, Reply, Request, Tensors
from fedgrove.runfolder import RunFolder


class Answer(NamedTuple):
    """A response that was checked."""

    client: str
    tensors: Tensors
    reply: Reply


def collect(
    engine: Engine,
    run: RunFolder,
    messages: Mapping[str, Message],
    *,
    layout: Decoder | None = None,
    clock: Clock | None = None,
    masking: Mapping[str, Any] | None = None,
) -> Iterator[Answer]:
    """Sends each client its message and yields the responses in the order of the clients' names.

    A response that comes before its turn waits on disk, so memory does not grow with the number of clients. If a client
    raises an error, does not respond in time or sends an invalid response, the request is sent to it again, up to
    ``rounds.retries`` times; then the client is left out.

    Args:
        messages: for each client its request and the tensors sent with it; all requests are of one type.
        layout: the model at the server, from which requests derive the tensors that they expect.
        clock: models the time of messages on the clients' own machines; the ledger records it.
        masking: by client, the masking of its response under secure aggregation. Masked values look random, so of the
            tensors only names, shapes and dtypes are checked.

    Yields:
        Client, tensors and reply of each valid response.

    Raises:
        FedgroveError: fewer clients sent a valid response than ``rounds.quorum`` (by default all); names the first that
            failed and why. It is raised after the last response, so use no result before the iteration ends.
    """
    rules = run.job.rounds
    inbox = run.path / "work" / "inbox"
    turns = sorted(messages)
    waiting: dict[str, bytes | Path | None] = {}  # responses before their turn; None where there is none
    failures: dict[str, str] = {}  # what was wrong with a client's latest response
    first = next(iter(messages.values())).request if messages else None

    def account(client: str, direction: Literal["up", "down"], size: int) -> None:
        modelled = clock.spend(client, direction, size) if clock else {}
        request = messages[client].request
        run.account(request.stage, request.round, client, direction, request.KIND, size, modelled)

    def send(clients: list[str]) -> Iterator[Answer]:
        assert first is not None
        run.listener.on_event(Requesting(tuple(clients)))
        heap.release_freed_memory()  # temporary memory of the server, so that clients in this process start alike
        outbox = _Outbox(
            {client: messages[client] for client in clients},
            masking or {},
            lambda client, size: account(client, "down", size),
        )
        bounds = {client: wire.largest(messages[client].request.expected(layout)) for client in clients}
        for client, response, error in engine.request(first.KIND, outbox, rules.timeout, max(bounds.values())):
            if client not in turns or waiting.get(client) is not None:
                continue  # late or repeated: the response is already there, or the client was left out
            heap.release_freed_memory()  # temporary memory of a client in this process
            if response is not None and len(response) > bounds[client]:
                response, error = None, too_large(bounds[client])
            if response is not None:
                account(client, "up", len(response))
            else:
                failures[client] = error or "it sent no response"
                run.listener.on_event(Responded(client, 0))
            if response is not None and client != turns[0]:
                inbox.mkdir(parents=True, exist_ok=True)
                waiting[client] = inbox / client
                (inbox / client).write_bytes(response)
            else:
                waiting[client] = response
            del response  # so that take() has the only reference and can free the memory
            yield from take()

    def take() -> Iterator[Answer]:
        """Yields responses whose turn has come; stops at a client whose response may still come."""
        while turns and turns[0] in waiting:
            client = turns[0]
            response = waiting[client]
            if isinstance(response, Path):
                path, response = response, response.read_bytes()
                path.unlink()
            if response is not None:
                try:
                    answer = _read(client, response, messages[client].request, layout, masked=masking is not None)
                    del response  # as large as a block
                except wire.WireError as error:
                    failures[client] = f"its response was refused: {error}"
                else:
                    failures.pop(client, None)
                    del waiting[client], turns[0]
                    heap.release_freed_memory()  # temporary memory of reading it
                    yield answer
                    del answer
                    heap.release_freed_memory()
                    continue
            waiting[client] = None
            if not last_try:
                return
            run.message(f"{client}: {failures[client]}")
            del waiting[client], turns[0]

    for attempt in range(rules.retries + 1):
        last_try = attempt == rules.retries
        unanswered = [client for client in turns if waiting.get(client) is None]
        for client in unanswered:
            waiting.pop(client, None)
        if unanswered:
            yield from send(unanswered)
    for client in turns:  # a missing reply counts as a failure, so a faulty engine cannot shrink the federation
        failures.setdefault(client, "it sent no response")
    needed = min(rules.quorum or len(messages), len(messages))
    answered = len(messages) - len(failures)
    if answered < needed:
        client, what = min(failures.items())
        what = what if what.startswith(f"client '{client}'") else f"client '{client}': {what}"
        raise FedgroveError(f"{what} ({answered} of {len(messages)} clients responded, {needed} needed: rounds.quorum)")


def _read(client: str, response: bytes, request: Request, layout: Decoder | None, masked: bool) -> Answer:
    """Unpacks a response and checks it against its request.

    Raises:
        WireError: it is damaged, belongs to another request, or is not what the request expects.
    """
    tensors, info = wire.unpack(response)
    if info.pop("request", None) != request.digest:
        raise wire.WireError("it belongs to another request")
    try:
        reply = request.REPLY.model_validate(info)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise wire.WireError(f"its reply is not understood ({printable(where, MAX_WORD)})") from error
    wire.check(tensors, request.expected(layout))
    request.check_reply(reply)
    if not masked:
        request.check(tensors, reply, layout)
    return Answer(client, tensors, reply)


class _Outbox(Mapping[str, bytes]):
    """Messages that are packed when the engine takes them, so that memory does not grow with the number of clients."""

    def __init__(self, messages: Mapping[str, Message], masking: Mapping[str, Any], sent: Callable[[str, int], None]):
        self._messages = messages
        self._masking = masking
        self._sent = sent

    def __getitem__(self, client: str) -> bytes:
        request, tensors = self._messages[client]
        message = wire.pack(tensors, {"request": request.model_dump(mode="json"), "masking": self._masking.get(client)})
        self._sent(client, len(message))
        return message

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)
