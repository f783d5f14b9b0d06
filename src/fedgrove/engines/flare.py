"""Clients at the sites of an NVIDIA FLARE federation: a request is a FLARE task for one site.

A run is one FLARE job. Its two ends are :class:`fedgrove.deploy.flare.controller.FedgroveController` at the server, which makes
this engine, and :class:`fedgrove.deploy.flare.executor.FedgroveExecutor` at each site. Bytes travel as tensors, which FLARE
streams in chunks and, at the server, keeps on disk until they are taken.
"""

from __future__ import annotations

import math
import queue
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable

from fedgrove.engines import error_codes
from fedgrove.engines.base import too_large
from fedgrove.engines.worker import Reply

TASK = "fedgrove"
# Keys of a Shareable.
VERSION, NONCE, KIND, RUN, SECONDS, BODY, ERROR = "version", "nonce", "kind", "run", "seconds", "body", "error"
WAIT = 3600.0  # seconds for a response if the job sets no timeout; without a limit, a run would wait for a dead site
STREAMED = 2**22  # bytes from which a message is sent as tensors, which FLARE streams
PIECE = 2**24  # bytes of one such tensor: the next one is prepared while one is being sent
MISSING = 5.0  # seconds to fetch a request, for a site that did not fetch the previous one
ENDED = "its process of this run has ended, and its own log says why; it can take part again after --resume"
ABSENT = "this run did not reach it (not connected, or its disk is full); it can take part after --resume"


@dataclass
class _Sent:
    """A request that has no response yet.

    Attributes:
        task: the FLARE task.
        nonce: a random number that the response must repeat.
        since: when it was passed to FLARE, in seconds of the monotonic clock.
        fetched: whether the site has taken it.
    """

    task: Any
    nonce: str
    since: float
    fetched: bool = False


@dataclass
class FlareEngine:
    """See :class:`fedgrove.engines.base.Engine`. A client has the name of its site.

    Attributes:
        controller: the controller of the running FLARE job.
        context: FLARE's context of the running job (FLContext).
        names: the names of the run's clients, connected or not.
        run: the name under which sites keep their working files.
        grace: seconds in which a site must fetch a request; otherwise it is skipped until the next request.
        aborted: returns whether the job was stopped.
        ended: returns the clients whose process of this run has ended.
        missing: clients that did not fetch the last request.
        given_up: client and nonce of every request that no longer waits for a response, and that the run has reported.
    """

    controller: Any
    context: Any
    names: list[str]
    run: str
    grace: float
    aborted: Callable[[], bool]
    ended: Callable[[], Collection[str]]
    missing: set[str] = field(default_factory=set)
    given_up: set[tuple[str, str]] = field(default_factory=set)

    def clients(self) -> list[str]:
        """The run's clients, sorted by name."""
        return sorted(self.names)

    def request(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None, largest: int | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        """See :meth:`fedgrove.engines.base.Engine.request`."""
        wait = timeout or WAIT
        connected = {client.name for client in self.context.get_engine().get_clients()}
        replies: queue.SimpleQueue[tuple[str, str, Any]] = queue.SimpleQueue()
        waiting: dict[str, _Sent] = {}
        ended = self.ended()
        for client in sorted(messages):
            if client in ended:
                yield client, None, ENDED
            elif client in connected:
                waiting[client] = self._send(kind, client, messages, wait, replies)
            else:
                yield client, None, ABSENT
        try:
            while waiting:
                try:
                    client, nonce, result = replies.get(timeout=0.1)
                except queue.Empty:
                    if self.aborted():
                        raise error_codes.Stopped("the run was stopped; continue it with --resume") from None
                    for client, why in self._overdue(waiting, wait):
                        self._give_up(client, waiting.pop(client))
                        yield client, None, why
                    continue
                if client not in waiting or waiting[client].nonce != nonce:
                    continue
                sent = waiting.pop(client)
                response, error = _read(result, nonce, largest)
                sent.task.data = result = None
                yield client, response, error
                del response
        finally:
            for client, sent in waiting.items():  # the caller has stopped iterating
                self._give_up(client, sent)

    def is_reported(self, client: str, result: Any) -> bool:
        """Whether a response without a request is one that came too late, of which the run has said so already.

        A site and FLARE learn at their own pace that a request is over, so such a response may come or not. It is known
        by its number, once: a second one is a repeated response.
        """
        nonce = result.get(NONCE)
        if not isinstance(nonce, str) or (client, nonce) not in self.given_up:
            return False
        self.given_up.discard((client, nonce))
        return True

    def _give_up(self, client: str, sent: _Sent) -> None:
        self.given_up.add((client, sent.nonce))  # before FLARE forgets the task: a response may come at any moment
        self.controller.cancel_task(sent.task)

    def _send(self, kind: str, client: str, messages: Mapping[str, bytes], wait: float, replies: Any) -> _Sent:
        nonce = secrets.token_hex(16)
        sent = _Sent(None, nonce, time.monotonic())

        def pack(client_task: Any, fl_ctx: Any) -> None:  # FLARE calls these four by keyword: keep these names
            sent.fetched = True
            self.missing.discard(client)
            data = Shareable()
            data.update({NONCE: nonce, KIND: kind, RUN: self.run, SECONDS: wait, VERSION: error_codes.VERSION})
            data[BODY] = body_of(messages[client])
            client_task.task.data = data

        def release(client_task: Any, fl_ctx: Any) -> None:
            client_task.task.data = Shareable()  # frees the message; pack() runs again if the site fetches again

        def receive(client_task: Any, fl_ctx: Any) -> None:
            result, client_task.result = client_task.result, None
            replies.put((client, nonce, result))

        def done(task: Any, fl_ctx: Any) -> None:
            replies.put((client, nonce, None))  # without effect if the response was received

        sent.task = Task(
            TASK,
            Shareable(),
            timeout=math.ceil(wait) + 60,  # our own deadline comes first; this one ends FLARE's bookkeeping
            before_task_sent_cb=pack,
            after_task_sent_cb=release,
            result_received_cb=receive,
            task_done_cb=done,
        )
        self.controller.send(sent.task, self.context, targets=[client])
        return sent

    def _overdue(self, waiting: Mapping[str, _Sent], wait: float) -> list[tuple[str, str]]:
        now = time.monotonic()
        ended = self.ended()
        late = []
        for client, sent in waiting.items():
            grace = min(self.grace, MISSING) if client in self.missing else self.grace
            if client in ended:
                late.append((client, ENDED))
            elif now - sent.since > wait:
                late.append((client, f"no response in {wait:g} s (rounds.timeout)"))
            elif not sent.fetched and now - sent.since > grace:
                self.missing.add(client)
                late.append((client, "it cannot be reached; it is asked again the next time"))
        return late


def _read(result: Any, nonce: str, largest: int | None) -> Reply:
    """A response's bytes, or one line that says what is wrong. What a site sent is checked before it is used."""
    if result is None:
        return None, "FLARE ended the request before there was a response"
    if result.get_return_code() != ReturnCode.OK:
        return None, f"FLARE at the site returned {error_codes.plain(result.get_return_code())}"
    if result.get(VERSION) != error_codes.VERSION:
        version = error_codes.plain(result.get(VERSION))
        return None, error_codes.message(error_codes.encode("version", "FedgroveError", version))
    if result.get(NONCE) != nonce:
        return None, "its response was refused: it belongs to another request"
    if ERROR in result:
        return None, error_codes.message(result[ERROR])
    try:
        return bytes_of(result.pop(BODY, None), largest), None
    except OverflowError:
        return None, too_large(largest or 0)
    except Exception as error:  # malformed data, or a transfer that was interrupted
        return None, f"its response did not arrive completely ({type(error).__name__})"


def body_of(message: bytes) -> Any:
    """A message as FLARE transports it: a large one as (n,) uint8 tensors, which FLARE streams; else as bytes."""
    if len(message) < STREAMED:
        return message
    whole = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    return [whole[start : start + PIECE] for start in range(0, len(message), PIECE)]


def bytes_of(body: Any, largest: int | None = None) -> bytes:
    """The inverse of :func:`body_of`.

    Args:
        largest: the most bytes that are taken; None: no limit.

    Raises:
        TypeError: ``body`` is neither bytes nor a list of such tensors.
        OverflowError: it has more bytes; of a list no more pieces were read than fit.
    """
    most = math.inf if largest is None else largest
    if isinstance(body, bytes):
        if len(body) > most:
            raise OverflowError
        return body
    if not isinstance(body, list):
        raise TypeError("not bytes")
    message = bytearray()
    for piece in body:
        tensor = piece.materialize() if hasattr(piece, "materialize") else piece  # FLARE keeps it on disk until here
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise TypeError("not bytes")
        if len(message) + tensor.numel() > most:
            raise OverflowError
        message += tensor.numpy().data
    return bytes(message)
