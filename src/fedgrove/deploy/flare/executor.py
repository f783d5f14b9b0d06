"""The Executor that FLARE runs at a site. It passes each request to a separate working process.

If that process is killed, the response is an error and the FLARE job continues.
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

from fedgrove.deploy.flare.files import JOB
from fedgrove.deploy.flare.upkeep import end_run, threads, write_log
from fedgrove.engines import error_codes
from fedgrove.engines.flare import BODY, ERROR, KIND, NONCE, RUN, SECONDS, VERSION, body_of, bytes_of
from fedgrove.engines.worker import Reply, Worker, WorkerDied

RESPOND = "fedgrove.deploy.flare.site:respond"  # by name: only the working process imports the libraries that it needs
LONGEST = 30 * 24 * 3600.0  # seconds that a request may take, whatever the server says


class FedgroveExecutor(Executor):  # type: ignore[misc]  # nvflare has no types
    """A site's part of a run. :mod:`fedgrove.deploy.flare.site` computes the responses, in the working process."""

    def __init__(self) -> None:
        super().__init__()
        fobs.register(TensorDecomposer)
        self._worker: Worker | None = None
        self._run: str | None = None  # the name of the run's working files

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Called by FLARE. Starts the working process early, so that it imports its libraries while FLARE connects."""
        if event_type == EventType.ABOUT_TO_START_RUN:
            try:
                self._worker = _start_worker(_kit_of(fl_ctx))
            except Exception:  # the first request tries again and reports the error
                _log_exception(fl_ctx)
        if event_type == EventType.END_RUN:
            if self._worker is not None:
                self._worker.stop()
            if self._run is not None:
                end_run(_kit_of(fl_ctx), self._run)

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """Called by FLARE for every request.

        No exception leaves this method: FLARE would write it to its own logs, where neither the site's owner nor the
        operator looks. The trace goes to the site's own log, and the response is an error code.
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
        """Lets the working process respond; restarts it if it takes too long or the run was stopped."""
        if data.get(VERSION) != error_codes.VERSION:
            return None, error_codes.encode("version", "FedgroveError", error_codes.VERSION)
        kit = _kit_of(fl_ctx)
        if self._worker is None:
            self._worker = _start_worker(kit)
        message = bytes_of(data.pop(BODY))
        seconds = min(max(0.0, float(data[SECONDS])), LONGEST)  # NaN counts as 0
        ends = time.monotonic() + seconds
        self._run = str(data[RUN])
        self._worker.send(kit, self._run, str(data[KIND]), message, _job_of(fl_ctx))
        del message
        while not self._worker.pipe.poll(0.05):
            if abort_signal.triggered or time.monotonic() > ends:
                self._worker.restart()
                return None, error_codes.encode("late", "TimeoutError", f"{seconds:g}")
        try:
            return self._worker.receive()
        except WorkerDied as death:
            return None, error_codes.encode("killed", "WorkerDied", str(death.status))


def _start_worker(kit: Path) -> Worker:
    return Worker(RESPOND, threads(kit), first_to_die=True)


def _kit_of(fl_ctx: Any) -> Path:
    return Path(fl_ctx.get_engine().get_workspace().get_root_dir())


def _job_of(fl_ctx: Any) -> Path:
    """The job file in the app that the operator signed; FLARE has compared it with the signature."""
    workspace = fl_ctx.get_engine().get_workspace()
    return Path(workspace.get_app_config_dir(fl_ctx.get_job_id())) / JOB


def _log_exception(fl_ctx: Any) -> None:
    """Writes the trace of the current exception to the site's own log."""
    trace = traceback.format_exc()
    with suppress(Exception):  # if FLARE does not know the site's folder, there is no log to write to
        write_log(_kit_of(fl_ctx), trace)
