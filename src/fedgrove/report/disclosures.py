"""What left a client, from the plans' lists of disclosures: the page and the model card say the same.

A plan's ``discloses`` holds names of :class:`~fedgrove.rounds.disclosure.Disclosure`, decided from the requests that the stage
makes; the phrases are that class's. Secure aggregation and noise are said around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedgrove.report.stage_reports import report_of
from fedgrove.report.summary import Stage
from fedgrove.report.words import capitalized, listed
from fedgrove.rounds.disclosure import Disclosure

APART = frozenset({Disclosure.CAPABILITIES.name, Disclosure.WINDOW_LOSSES.name})  # said for the run, not for a stage


def what_left(job: Mapping[str, Any], stages: Sequence[Stage]) -> list[str]:
    """What clients sent, stage by stage, and who could see it: a paragraph each."""
    says = [f"No text and no tokens left a client. Before the first stage each client sent {Disclosure.CAPABILITIES.sentence}."]
    if any(Disclosure.WINDOW_LOSSES.name in stage.plan.get("discloses", ()) for stage in stages):
        says.append(f"To measure what each client has alone, it sent {Disclosure.WINDOW_LOSSES.sentence}.")
    for stage in stages:
        sent = f"each client sent {sent_in(stage)}."
        name = report_of(stage.kind).DOING or stage.kind
        says.append(f"Stage {stage.number}, {name}: {sent}" if len(stages) > 1 else capitalized(sent))
        limits = report_of(stage.kind).limits(stage.config)
        says[-1] += f" {limits}" if limits else ""
    return [*says, _seen(job, stages)]


def sent_in(stage: Stage) -> str:
    """What each client sent in a stage, to stand behind "sent"."""
    if "discloses" not in stage.plan:
        return "something that its plan does not name"
    names: list[str] = [name for name in stage.plan["discloses"] if name not in APART]
    order = list(Disclosure.__members__)
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    phrases = [Disclosure[name].sentence if name in order else name for name in names]
    return listed(phrases, "; ", ", and " if len(phrases) == 2 else "; and ") or "nothing"


def noisy(stage: Stage) -> bool:
    """Whether noise was added to what clients sent, or to its sum."""
    return bool(stage.plan.get("noise")) or stage.config.get("epsilon") is not None


def _seen(job: Mapping[str, Any], stages: Sequence[Stage]) -> str:
    """Who could see it, and whether there is noise."""
    if job.get("privacy", {}).get("secure_aggregation"):
        says = (
            "Secure aggregation was on: whoever ran the server saw the numbers of each stage added up over the clients, and "
            "those of no single client; the descriptions were seen one by one."
        )
    else:
        says = "Whoever ran the server could see what each client sent."
    with_noise = [stage.number for stage in stages if noisy(stage)]
    if not with_noise:
        return (
            f"{says} No noise was added: these numbers are less than text, but they are computed from text, and nothing here "
            "is a proof of privacy."
        )
    if len(with_noise) == len(stages):
        return f"{says} Noise was added; what that promises is stated below."
    numbers = listed([str(number) for number in with_noise])
    return f"{says} Noise was added in stage {numbers} only; what that promises is stated below."
