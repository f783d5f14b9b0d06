"""Clients at the sites of an NVIDIA FLARE federation: one Controller at the server, one Executor at each site.

A run is one FLARE job whose files name these two classes and bring no code. The Executor hands every ask to a warm process
of its own: where that one is killed, an error is the answer and the job lives. Bytes travel as one tensor, which FLARE
streams in chunks and, at the server, keeps on disk until they are taken.
"""

from __future__ import annotations

import math
import queue
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.controller_spec import Task
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.utils.tensor_disk_offload_context import cleanup_tensor_disk_offload, setup_tensor_disk_offload
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from fedgrove.engines import error_codes as faults
from fedgrove.engines.worker import Child, ChildDied, Reply

TASK = "fedgrove"
VERSION, ASK, KIND, RUN, SECONDS, BODY, ERROR = "version", "ask", "kind", "run", "seconds", "body", "error"
WAIT = 3600.0  # seconds for an answer where the job says nothing: an ask without an end would wait for a dead site
STREAMED = 2**22  # bytes from which a message is streamed, so that even its last piece is
PIECE = 2**24  # bytes of a piece: the next one is made while one is under way
MISSING = 5.0  # seconds to fetch an ask for a site that let the last one lie


@dataclass
class _Sent:
    """An ask that is out."""

    task: Any
    nonce: str
    since: float
    fetched: bool = False


@dataclass
class FlareEngine:
    """See :class:`fedgrove.engines.base.Engine`.

    Attributes:
        controller: of the running FLARE job.
        context: FLARE's, of the running job.
        members: the sites of the run, whether they are here or not.
        run: the name under which sites keep their working files.
        grace: seconds in which a site must fetch an ask; one that does not is missing, and is asked again the next time.
        aborted: tells whether somebody stopped the job.
    """

    controller: Any
    context: Any
    members: list[str]
    run: str
    grace: float
    aborted: Callable[[], bool]
    missing: set[str] = field(default_factory=set)

    def sites(self) -> list[str]:
        """The members, sorted by name."""
        return sorted(self.members)

    def ask(
        self, kind: str, messages: Mapping[str, bytes], timeout: float | None = None
    ) -> Iterator[tuple[str, bytes | None, str | None]]:
        """See :meth:`fedgrove.engines.base.Engine.ask`."""
        wait = timeout or WAIT
        here = {client.name for client in self.context.get_engine().get_clients()}
        replies: queue.SimpleQueue[tuple[str, str, Any]] = queue.SimpleQueue()
        out: dict[str, _Sent] = {}
        for site in sorted(messages):
            if site in here:
                out[site] = self._send(kind, site, messages, wait, replies)
            else:
                yield site, None, "it was not connected when this run was submitted; it can take part after --resume"
        try:
            while out:
                try:
                    site, nonce, result = replies.get(timeout=0.1)
                except queue.Empty:
                    if self.aborted():
                        raise faults.Stopped("the run was stopped; continue it with --resume") from None
                    for site, why in self._overdue(out, wait):
                        self.controller.cancel_task(out.pop(site).task)
                        yield site, None, why
                    continue
                if site not in out or out[site].nonce != nonce:
                    continue
                sent = out.pop(site)
                answer, error = _read(result, nonce)
                sent.task.data = result = None
                yield site, answer, error
                del answer
        finally:
            for sent in out.values():  # whoever asked has stopped listening
                self.controller.cancel_task(sent.task)

    def _send(self, kind: str, site: str, messages: Mapping[str, bytes], wait: float, replies: Any) -> _Sent:
        nonce = secrets.token_hex(16)
        sent = _Sent(None, nonce, time.monotonic())

        def pack(client_task: Any, fl_ctx: Any) -> None:  # FLARE calls by keyword
            sent.fetched = True
            self.missing.discard(site)
            ask = Shareable()
            ask.update({ASK: nonce, KIND: kind, RUN: self.run, SECONDS: wait, VERSION: faults.VERSION})
            ask[BODY] = _packed(messages[site])
            client_task.task.data = ask

        def let_go(client_task: Any, fl_ctx: Any) -> None:
            client_task.task.data = Shareable()  # a site that fetches it again is sent it anew

        def receive(client_task: Any, fl_ctx: Any) -> None:
            result, client_task.result = client_task.result, None
            replies.put((site, nonce, result))

        def done(task: Any, fl_ctx: Any) -> None:
            replies.put((site, nonce, None))  # without effect where the answer is there

        sent.task = Task(
            TASK,
            Shareable(),
            timeout=math.ceil(wait) + 60,  # our own deadline comes first; this one ends FLARE's bookkeeping
            before_task_sent_cb=pack,
            after_task_sent_cb=let_go,
            result_received_cb=receive,
            task_done_cb=done,
        )
        self.controller.send(sent.task, self.context, targets=[site])
        return sent

    def _overdue(self, out: Mapping[str, _Sent], wait: float) -> list[tuple[str, str]]:
        now = time.monotonic()
        late = []
        for site, sent in out.items():
            grace = min(self.grace, MISSING) if site in self.missing else self.grace
            if now - sent.since > wait:
                late.append((site, f"no answer in {wait:g} s (rounds.timeout)"))
            elif not sent.fetched and now - sent.since > grace:
                self.missing.add(site)
                late.append((site, "it cannot be reached; it is asked again the next time"))
        return late


class Hub(Controller):  # type: ignore[misc]  # nvflare has no types
    """The server's part of a run. Everything it does is in :func:`fedgrove.deploy.flare.coordinate.conduct`.

    Args:
        resume: continue the run of this name.
    """

    def __init__(self, resume: bool = False):
        super().__init__(task_check_period=0.05)
        self._resume = resume
        self._recorder: Any = None

    def start_controller(self, fl_ctx: Any) -> None:
        """Called by FLARE before the run."""
        fobs.register(TensorDecomposer)
        fl_ctx.get_engine().register_app_command("progress", self._progress)

    def stop_controller(self, fl_ctx: Any) -> None:
        """Called by FLARE after the run."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """The run."""
        from fedgrove.deploy.flare.coordinate import Recorder, conduct

        self._recorder = recorder = Recorder()
        engine = fl_ctx.get_engine()
        workspace = engine.get_workspace()
        kit, job = Path(workspace.get_root_dir()), fl_ctx.get_job_id()
        offload = setup_tensor_disk_offload(engine, True, job)

        def reach(members: list[str], run: str, grace: float) -> FlareEngine:
            return FlareEngine(self, fl_ctx, members, run, grace, lambda: bool(abort_signal.triggered))

        try:
            config, leave = Path(workspace.get_app_config_dir(job)), Path(workspace.get_run_dir(job))
            fault = conduct(kit, config, leave, self._resume, reach, recorder)
        finally:
            cleanup_tensor_disk_offload(engine, offload)
        if fault:
            self.system_panic(fault, fl_ctx)

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: Any
    ) -> None:
        """An answer that comes late or twice is let go."""
        if self._recorder is not None:
            self._recorder.say(f"{client.name}: an answer that nobody waits for was refused")

    def _progress(self, topic: str, data: Any, fl_ctx: Any) -> dict[str, Any]:
        since = data.get("since", 0) if isinstance(data, dict) else 0
        if self._recorder is None:
            return {"events": [], "cards": {}}
        return {"events": self._recorder.events[int(since) :], "cards": self._recorder.cards}


class Seat(Executor):  # type: ignore[misc]
    """A site's part of a run. What it answers is decided in :mod:`fedgrove.deploy.flare.site`, in a process of its own."""

    def __init__(self) -> None:
        super().__init__()
        fobs.register(TensorDecomposer)
        self._child: Child | None = None

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Called by FLARE: the working process is there, and its libraries read, while FLARE still connects."""
        if event_type == EventType.ABOUT_TO_START_RUN:
            self._child = _begin(fl_ctx)
        if event_type == EventType.END_RUN and self._child is not None:
            self._child.stop()

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """Called by FLARE for every ask; nothing is ever raised from here, for FLARE would write it down."""
        reply = make_reply(ReturnCode.OK)
        reply[ASK], reply[VERSION] = shareable.get(ASK), faults.VERSION
        try:
            answer, error = self._answer(shareable, fl_ctx, abort_signal)
        except Exception as fault:
            answer, error = None, faults.of(fault)
        if answer is None:
            reply[ERROR] = error
        else:
            reply[BODY] = _packed(answer)
        return reply

    def _answer(self, ask: Any, fl_ctx: Any, abort_signal: Any) -> Reply:
        if ask.get(VERSION) != faults.VERSION:
            return None, faults.line("version", "FedgroveError", faults.VERSION)
        if self._child is None:
            self._child = _begin(fl_ctx)
        body = _bytes(ask.pop(BODY))
        ends = time.monotonic() + float(ask[SECONDS])
        self._child.send(_kit(fl_ctx), str(ask[RUN]), str(ask[KIND]), body)
        del body
        while not self._child.pipe.poll(0.05):
            if abort_signal.triggered or time.monotonic() > ends:
                self._child.restart()
                return None, faults.line("late", "TimeoutError")
        try:
            return self._child.receive()
        except ChildDied as death:
            return None, faults.line("killed", "ChildDied", str(death.status))


def _begin(fl_ctx: Any) -> Child:
    from fedgrove.deploy.flare.site import answer, threads

    return Child(answer, threads(_kit(fl_ctx)), first_to_die=True)


def _kit(fl_ctx: Any) -> Path:
    return Path(fl_ctx.get_engine().get_workspace().get_root_dir())


def _read(result: Any, nonce: str) -> Reply:
    """An answer's bytes, or one line that says what is wrong. Nothing of it is believed before it is looked at."""
    if result is None:
        return None, "FLARE ended the ask before there was an answer"
    if result.get_return_code() != ReturnCode.OK:
        return None, f"FLARE at the site answered {faults.plain(result.get_return_code())}"
    if result.get(VERSION) != faults.VERSION:
        theirs = faults.plain(result.get(VERSION))
        return None, faults.told(faults.line("version", "FedgroveError", theirs))
    if result.get(ASK) != nonce:
        return None, "its answer was refused: it belongs to another ask"
    if ERROR in result:
        return None, faults.told(result[ERROR])
    try:
        return _bytes(result.pop(BODY, None)), None
    except Exception as fault:  # whatever a site sent, or a transfer that broke
        return None, f"its answer did not arrive whole ({type(fault).__name__})"


def _packed(message: bytes) -> Any:
    """What FLARE moves: a large message as tensors, which it streams one after the other; a small one as it is."""
    if len(message) < STREAMED:
        return message
    whole = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    return [whole[start : start + PIECE] for start in range(0, len(message), PIECE)]


def _bytes(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    if not isinstance(body, list):
        raise TypeError("not bytes")
    message = bytearray()
    for piece in body:
        tensor = piece.materialize() if hasattr(piece, "materialize") else piece  # it waited on disk
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise TypeError("not bytes")
        message += tensor.numpy().data
    return bytes(message)
