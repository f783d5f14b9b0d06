"""What FLARE runs at a site: its Executor. It hands each request to a working process of its own.

Where that process is killed, an error is the response and the FLARE job lives.
"""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import make_reply
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from fedgrove.deploy.flare.site import respond, threads, write_log
from fedgrove.engines import error_codes
from fedgrove.engines.flare import BODY, ERROR, KIND, NONCE, RUN, SECONDS, VERSION, body_of, bytes_of
from fedgrove.engines.worker import Reply, Worker, WorkerDied


class FedgroveExecutor(Executor):  # type: ignore[misc]  # nvflare has no types
    """A site's part of a run. How it responds is decided in :mod:`fedgrove.deploy.flare.site`, in the working process."""

    def __init__(self) -> None:
        super().__init__()
        fobs.register(TensorDecomposer)
        self._worker: Worker | None = None

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Called by FLARE: the working process starts, and reads its libraries, while FLARE still connects."""
        if event_type == EventType.ABOUT_TO_START_RUN:
            try:
                self._worker = _start_worker(_kit_of(fl_ctx))
            except Exception:  # the first request tries again, and its response says what is wrong
                _log_exception(fl_ctx)
        if event_type == EventType.END_RUN and self._worker is not None:
            self._worker.stop()

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """Called by FLARE for every request.

        Nothing is raised from here: FLARE would keep the exception in logs of its own, where neither the site's owner nor the
        operator looks. Its trace goes to the site's own log, and a code of it is the response.
        """
        reply = make_reply(ReturnCode.OK)
        reply[NONCE], reply[VERSION] = shareable.get(NONCE), error_codes.VERSION
        try:
            response, error = self._respond(shareable, fl_ctx, abort_signal)
            if response is not None:
                reply[BODY] = body_of(response)
            else:
                reply[ERROR] = error
        except Exception as exception:
            reply[ERROR] = error_codes.encode_exception(exception)
            _log_exception(fl_ctx)
        return reply

    def _respond(self, data: Any, fl_ctx: Any, abort_signal: Any) -> Reply:
        """Has the working process respond; restarts it where it takes too long or somebody stopped the run."""
        if data.get(VERSION) != error_codes.VERSION:
            return None, error_codes.encode("version", "FedgroveError", error_codes.VERSION)
        kit = _kit_of(fl_ctx)
        if self._worker is None:
            self._worker = _start_worker(kit)
        message = bytes_of(data.pop(BODY))
        ends = time.monotonic() + float(data[SECONDS])
        self._worker.send(kit, str(data[RUN]), str(data[KIND]), message)
        del message
        while not self._worker.pipe.poll(0.05):
            if abort_signal.triggered or time.monotonic() > ends:
                self._worker.restart()
                return None, error_codes.encode("late", "TimeoutError")
        try:
            return self._worker.receive()
        except WorkerDied as death:
            return None, error_codes.encode("killed", "WorkerDied", str(death.status))


def _start_worker(kit: Path) -> Worker:
    return Worker(respond, threads(kit), first_to_die=True)


def _kit_of(fl_ctx: Any) -> Path:
    return Path(fl_ctx.get_engine().get_workspace().get_root_dir())


def _log_exception(fl_ctx: Any) -> None:
    """Writes the exception that is being handled to the site's own log."""
    trace = traceback.format_exc()
    with suppress(Exception):  # where FLARE does not even say where the site's folder is, there is no log to write to
        write_log(_kit_of(fl_ctx), trace)
