"""What one owner of everybody's text would get: a reference that only a simulation can have.

In a federation no text may be put in one place, so nobody knows what that would bring. Where all clients are simulated on
one machine it can be tried: the same job once more, with one client that has the same windows of text as all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedgrove.client.handlers import LocalClient
from fedgrove.job import Client, Job, StructuredStage, Privacy, PruneStage, Rounds, TuneStage
from fedgrove.report.summary import CENTRALIZED


def centralized_job(job: Job) -> Job:
    """The job of one owner of all text, on whom nothing presses: no limits, nothing to hide, no bytes to save.

    A stage that prunes sees every client's windows; with aggregation "pooled" its model is that of the federation, bit for bit,
    unless noise, ``mixed`` or ``protect_first_block`` changed that. A stage that tunes takes as many steps as all clients
    together, each on the largest batch at the largest ranks, by plain LoRA (or "full").
    """
    several = len(job.clients)
    stages: list[StructuredStage | PruneStage | TuneStage] = []
    for stage in job.stages:
        if isinstance(stage, PruneStage | StructuredStage):
            samples = sum(client.samples or stage.samples for client in job.clients)
            stage = stage.model_copy(update={"samples": samples})
        if isinstance(stage, PruneStage):
            aggregation = stage.aggregation if stage.aggregation == "pooled" else "fedspallm"  # which leave one client's weights as they are
            rounds = stage.rounds if stage.layers == "all" else 1
            changes = {"aggregation": aggregation, "rounds": rounds, "layers": "all", "source": stage.walk, "shrink": 0.0, "trim": 0}
            changes |= {"expand": True, "max_weight_growth": None, "mixed": False, "protect_first_block": False, "epsilon": None}
            stages.append(stage.model_copy(update=changes))
        elif isinstance(stage, TuneStage):
            method = stage.method if stage.method == "full" else "lora"
            changes = {"method": method, "aggregation": "flexlora", "steps": stage.steps * several, "server_optimizer": "average"}
            changes |= {"precision": "float32", "epsilon": None, "personal": 0.0, "proximal": 0.0, "eval_every": 0}
            stages.append(stage.model_copy(update=changes))
        else:
            stages.append(stage)
    everything = Client(name=CENTRALIZED, data=tuple(file for client in job.clients for file in client.data))
    evaluate = job.evaluate.model_copy(update={"alone": False, "centralized": False, "speed": False, "prompts": ()})
    return job.model_copy(
        update={
            "name": f"{job.name[:50]}-{CENTRALIZED}",
            "clients": (everything,),
            "stages": tuple(stages),
            "evaluate": evaluate,
            "rounds": Rounds(),
            "privacy": Privacy(),
        }
    )


def centralized_site(sites: Sequence[LocalClient], folder: Path) -> LocalClient:
    """The one client: it has the text of ``sites``, and keeps its working files in a folder of its own."""
    owners = tuple(replace(site, folder=folder / CENTRALIZED / site.name, credentials=None) for site in sites)
    first = sites[0]
    return LocalClient(CENTRALIZED, folder / CENTRALIZED, first.model, first.dtype, (), None, {"bits": [32, 16, 8, 4]}, owners=owners)
