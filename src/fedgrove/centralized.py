"""The centralized reference run: the same job with one client that has everybody's text.

In a federation no text may be put in one place, so this run is not possible there. In a simulation on one machine it
is: the job runs again with one client that has the same windows of text as all clients together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedgrove.client.local_client import LocalClient
from fedgrove.job.tables import Client, Job, Privacy, Rounds
from fedgrove.report.summary import CENTRALIZED


def centralized_job(job: Job) -> Job:
    """The job for one client with all text: no resource limits, no privacy settings, no communication cost.

    Each kind of stage defines its centralized version in :meth:`fedgrove.job.stage_config.StageConfig.centralized`.
    """
    everything = Client(name=CENTRALIZED, data=tuple(file for client in job.clients for file in client.data))
    evaluate = job.evaluate.model_copy(update={"alone": False, "centralized": False, "speed": False, "prompts": (), "new": ()})
    return job.model_copy(
        update={
            "name": f"{job.name[:50]}-{CENTRALIZED}",
            "clients": (everything,),
            "stages": tuple(stage.centralized(job) for stage in job.stages),
            "evaluate": evaluate,
            "rounds": Rounds(),
            "privacy": Privacy(),
        }
    )


def centralized_client(clients: Sequence[LocalClient], folder: Path) -> LocalClient:
    """One client with the text of all ``clients``; its working files are in ``folder``."""
    owners = tuple(replace(client, folder=folder / CENTRALIZED / client.name, credentials=None) for client in clients)
    first = clients[0]
    return LocalClient(
        CENTRALIZED,
        folder / CENTRALIZED,
        first.model,
        first.dtype,
        (),
        None,
        {"bits": [32, 16, 8, 4]},
        owners=owners,
        shares=first.shares,
        endpoint=first.endpoint,
    )
