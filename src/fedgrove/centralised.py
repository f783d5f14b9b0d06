"""What one owner of everybody's text would get: a reference that only a simulation can have.

In a federation no text may be put in one place, so nobody knows what that would bring. Where all clients are simulated on
one machine it can be tried: the same job once more, with one client that has the same windows of text as all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedgrove.client import Site
from fedgrove.job import Client, Job, NarrowStage, Privacy, PruneStage, Rounds, TuneStage
from fedgrove.report.summary import CENTRALISED


def centralised_job(job: Job) -> Job:
    """The job of one owner of all text, on whom nothing presses: no limits, nothing to hide, no bytes to save.

    A stage that prunes sees every client's windows; with rule "statistics" its model is that of the federation, bit for bit,
    unless noise, ``mixed`` or ``protect_first_block`` changed that. A stage that tunes takes as many steps as all clients
    together, each on the largest batch at the largest ranks, by plain LoRA (or "full").
    """
    several = len(job.clients)
    stages: list[NarrowStage | PruneStage | TuneStage] = []
    for stage in job.stages:
        if isinstance(stage, PruneStage | NarrowStage):
            samples = sum(client.samples or stage.samples for client in job.clients)
            stage = stage.model_copy(update={"samples": samples})
        if isinstance(stage, PruneStage):
            rule = stage.rule if stage.rule == "statistics" else "votes"  # which leave one client's weights as they are
            rounds = stage.rounds if stage.layers == "all" else 1
            changes = {"rule": rule, "rounds": rounds, "layers": "all", "source": stage.walk, "shrink": 0.0, "trim": 0}
            changes |= {"expand": True, "bound": None, "mixed": False, "protect_first_block": False, "epsilon": None}
            stages.append(stage.model_copy(update=changes))
        elif isinstance(stage, TuneStage):
            method = stage.method if stage.method == "full" else "lora"
            changes = {"method": method, "rule": "ranks", "steps": stage.steps * several, "server": "average"}
            changes |= {"precision": "float32", "epsilon": None, "personal": 0.0, "proximal": 0.0, "measure": 0}
            stages.append(stage.model_copy(update=changes))
        else:
            stages.append(stage)
    everything = Client(name=CENTRALISED, data=tuple(file for client in job.clients for file in client.data))
    evaluate = job.evaluate.model_copy(update={"alone": False, "centralised": False, "speed": False, "prompts": ()})
    return job.model_copy(
        update={
            "name": f"{job.name[:50]}-{CENTRALISED}",
            "clients": (everything,),
            "stages": tuple(stages),
            "evaluate": evaluate,
            "rounds": Rounds(),
            "privacy": Privacy(),
        }
    )


def centralised_site(sites: Sequence[Site], folder: Path) -> Site:
    """The one client: it has the text of ``sites``, and keeps its working files in a folder of its own."""
    owners = tuple(replace(site, folder=folder / CENTRALISED / site.name, credentials=None) for site in sites)
    first = sites[0]
    return Site(CENTRALISED, folder / CENTRALISED, first.model, first.dtype, (), None, {"bits": [32, 16, 8, 4]}, owners=owners)
