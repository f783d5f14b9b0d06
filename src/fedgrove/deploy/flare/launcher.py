"""Starts the process of a job, at the server or at a site, whatever characters the paths contain.

FLARE's own launchers join the arguments with spaces and split the result again, so a space in a path becomes two
arguments. These quote each argument. ``local/resources.json`` of a kit names them.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher
from nvflare.utils.job_launcher_utils import get_client_job_args, get_server_job_args


class SiteLauncher(ClientProcessJobLauncher):  # type: ignore[misc]  # nvflare has no types
    """Starts the process of a job at a site."""

    def get_command(self, job_meta: Any, fl_ctx: Any) -> str:
        """Called by FLARE: the command, quoted for :func:`shlex.split`."""
        return command(fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS), get_client_job_args())


class ServerLauncher(ServerProcessJobLauncher):  # type: ignore[misc]  # nvflare has no types
    """Starts the process of a job at the server."""

    def get_command(self, job_meta: Any, fl_ctx: Any) -> str:
        """Called by FLARE: the command, quoted for :func:`shlex.split`."""
        return command(fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS), get_server_job_args())


def command(arguments: Mapping[str, tuple[str, Any]], names: Sequence[str]) -> str:
    """The command of a job's process, quoted for :func:`shlex.split`.

    Args:
        arguments: by name, an option and its value; the value of ``OPTIONS`` is several words.
        names: the arguments to pass, in order; those that ``arguments`` lacks are left out.
    """
    words = [sys.executable]
    for name in names:
        if name in arguments:
            option, value = arguments[name]
            words += [option, *(str(value).split() if name == JobProcessArgs.OPTIONS else [str(value)])]
    return shlex.join(words)
