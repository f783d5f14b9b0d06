"""The Controller that FLARE runs at the server. The run itself is in :mod:`fedgrove.deploy.flare.coordinate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.impl.controller import Controller
from nvflare.app_common.utils.tensor_disk_offload_context import cleanup_tensor_disk_offload, setup_tensor_disk_offload
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from fedgrove.deploy.flare.coordinate import Recorder, coordinate
from fedgrove.deploy.flare.outcomes import ended_sites
from fedgrove.engines.flare import FlareEngine


class FedgroveController(Controller):  # type: ignore[misc]  # nvflare has no types
    """The server's part of a run.

    Args:
        resume: continue the existing run of the job's name.
    """

    def __init__(self, resume: bool = False):
        super().__init__(task_check_period=0.05)
        self._resume = resume
        self._recorder: Recorder | None = None
        self._engine: FlareEngine | None = None

    def start_controller(self, fl_ctx: Any) -> None:
        """Called by FLARE before the run."""
        fobs.register(TensorDecomposer)
        fl_ctx.get_engine().register_app_command("progress", self._progress)

    def stop_controller(self, fl_ctx: Any) -> None:
        """Called by FLARE after the run."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """Called by FLARE: runs the job."""
        self._recorder = recorder = Recorder()
        engine = fl_ctx.get_engine()
        workspace = engine.get_workspace()
        kit, job = Path(workspace.get_root_dir()), fl_ctx.get_job_id()
        offload = setup_tensor_disk_offload(engine, True, job)

        config, results = Path(workspace.get_app_config_dir(job)), Path(workspace.get_run_dir(job))

        def connect(clients: list[str], run: str, grace: float) -> FlareEngine:
            def aborted() -> bool:
                return bool(abort_signal.triggered)

            self._engine = FlareEngine(self, fl_ctx, clients, run, grace, aborted, lambda: ended_sites(results))
            return self._engine

        try:
            error = coordinate(kit, config, results, self._resume, connect, recorder)
        finally:
            cleanup_tensor_disk_offload(engine, offload)
        if error:
            self.system_panic(error, fl_ctx)

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: Any
    ) -> None:
        """Called by FLARE: drops a response that is late or repeated."""
        if self._engine is not None and self._engine.is_reported(client.name, result):
            return
        if self._recorder is not None:
            self._recorder.message(f"{client.name}: a late or repeated response was dropped")

    def _progress(self, topic: str, data: Any, fl_ctx: Any) -> dict[str, Any]:
        since = data.get("since", 0) if isinstance(data, dict) else 0
        if self._recorder is None:
            return {"events": [], "capabilities": {}}
        return {"events": self._recorder.events[int(since) :], "capabilities": self._recorder.capabilities}
