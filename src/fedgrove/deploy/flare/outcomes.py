"""Keeps a run going at the server when the process of one site ends or does not start.

FLARE 2.9 ends a job for all sites as soon as one site reports that its process has failed, and it has no setting for
that (``FederatedServer.process_job_failure``, ``check_client_replies``). Here such a report is only noted; the run
decides, by its quorum. ``local/resources.json`` of the server's kit names the class.

This is the only module that uses FLARE's private names; ``tests/strangers/test_flare.py`` fails when they change.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import CellMessageAuthHeaderKey, FLContextKey
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.apis.workspace import Workspace
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, MessageHeaderKey
from nvflare.private.admin_defs import Message as AdminMessage
from nvflare.private.defs import ERROR_MSG_PREFIX, JobFailureMsgKey, TrainingTopic

ENDED = "ended"  # a folder in the job's folder at the server: one empty file for each site whose process has ended
ADMIN = "admin"  # the topic under which FLARE's server sends its requests to sites
STARTED = f"reply_{TrainingTopic.START_JOB}"


class SiteOutcomes(FLComponent):  # type: ignore[misc]  # nvflare has no types
    """Notes which sites' processes have ended, and lets the job continue without them."""

    def __init__(self) -> None:
        super().__init__()
        self._engine: Any = None
        self._workspace: Workspace | None = None
        self._job = ""  # the job that is being started

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Called by FLARE, in the server's own process."""
        if event_type == EventType.SYSTEM_START:
            self._engine = fl_ctx.get_engine()
            self._workspace = fl_ctx.get_workspace()
            cell = self._engine.get_cell().core_cell
            cell.add_incoming_request_filter(CellChannel.SERVER_MAIN, CellChannelTopic.REPORT_JOB_FAILURE, self.note_end)
            cell.add_incoming_reply_filter(CellChannel.CLIENT_MAIN, ADMIN, self.note_start)
        if event_type == EventType.JOB_DEPLOYED:
            self._job = str(fl_ctx.get_prop(FLContextKey.CURRENT_JOB_ID))

    def note_end(self, message: Any) -> None:
        """A site reports that its process of a job has ended: FLARE then takes it as a process that ended well."""
        report = message.payload
        if not isinstance(report, dict):
            return  # FLARE refuses it
        report[JobFailureMsgKey.CODE] = JobReturnCode.SUCCESS
        site = self._engine.get_client_name_from_token(message.get_header(CellMessageAuthHeaderKey.TOKEN))
        if site:
            self._note(str(report.get(JobFailureMsgKey.JOB_ID)), site)

    def note_start(self, message: Any) -> None:
        """A site replies that it could not start its process of a job: FLARE then takes it as a site that is silent."""
        reply = message.payload
        if not isinstance(reply, AdminMessage) or reply.topic != STARTED:
            return
        if isinstance(reply.body, str) and reply.body.startswith(ERROR_MSG_PREFIX):
            message.payload = None
            self._note(self._job, str(message.get_header(MessageHeaderKey.ORIGIN)))

    def _note(self, job: str, site: str) -> None:
        if self._workspace is None or site != Path(site).name:
            return
        with suppress(ValueError, OSError):  # no id of a job, or of one that has ended: nobody asks
            folder = Path(self._workspace.get_run_dir(job))
            if folder.is_dir():
                (folder / ENDED).mkdir(exist_ok=True)
                (folder / ENDED / site).touch()


def ended_sites(job: Path) -> set[str]:
    """The sites whose process of a job has ended, or could not be started.

    Args:
        job: the job's folder at the server.
    """
    folder = job / ENDED
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()
