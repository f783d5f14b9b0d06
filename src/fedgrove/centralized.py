"""What one owner of everybody's text would get: a reference that only a simulation can have.

In a federation no text may be put in one place, so nobody knows what that would bring. Where all clients are simulated on
one machine it can be tried: the same job once more, with one client that has the same windows of text as all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedgrove.client.local_client import LocalClient
from fedgrove.job.tables import Client, Job, Privacy, Rounds
from fedgrove.report.summary import CENTRALIZED


def centralized_job(job: Job) -> Job:
    """The job of one owner of all text, on whom nothing presses: no limits, nothing to hide, no bytes to save.

    What that is for a stage, its own table says: :meth:`fedgrove.job.stage_config.StageConfig.centralized`.
    """
    everything = Client(name=CENTRALIZED, data=tuple(file for client in job.clients for file in client.data))
    evaluate = job.evaluate.model_copy(update={"alone": False, "centralized": False, "speed": False, "prompts": ()})
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
    """The one client: it has the text of ``clients``, and keeps its working files in a folder of its own."""
    owners = tuple(replace(client, folder=folder / CENTRALIZED / client.name, credentials=None) for client in clients)
    first = clients[0]
    return LocalClient(
        CENTRALIZED, folder / CENTRALIZED, first.model, first.dtype, (), None, {"bits": [32, 16, 8, 4]}, owners=owners
    )
