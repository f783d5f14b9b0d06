"""What left a client, from the plans' lists of disclosures, for the page and the model card.

A plan's ``discloses`` lists names of :class:`~fedgrove.rounds.disclosure.Disclosure`, computed from the stage's
requests; that class has the phrases. Sentences about secure aggregation and noise are added here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedgrove.report.stage_reports import report_of
from fedgrove.report.summary import Stage
from fedgrove.report.words import capitalized, listed
from fedgrove.rounds.disclosure import Disclosure

APART = frozenset({Disclosure.CAPABILITIES.name, Disclosure.WINDOW_LOSSES.name})  # reported once for the run


def what_left(job: Mapping[str, Any], stages: Sequence[Stage]) -> list[str]:
    """Paragraphs about what clients sent, stage by stage, and who could see it."""
    stayed = "No text and no tokens were sent to the server" if at_endpoints(stages) else "No text and no tokens left a client"
    says = [f"{stayed}. Before the first stage each client sent {Disclosure.CAPABILITIES.sentence}."]
    if at_endpoints(stages):
        says.append(f"{capitalized(where_text_went(stages))}.")
    if any(Disclosure.WINDOW_LOSSES.name in stage.plan.get("discloses", ()) for stage in stages):
        says.append(f"To measure each client's model without the others, the client sent {Disclosure.WINDOW_LOSSES.sentence}.")
    for stage in stages:
        sent = f"each client sent {sent_in(stage)}."
        name = report_of(stage.kind).DOING or stage.kind
        says.append(f"Stage {stage.number}, {name}: {sent}" if len(stages) > 1 else capitalized(sent))
        limits = report_of(stage.kind).limits(stage.config)
        says[-1] += f" {limits}" if limits else ""
    return [*says, _seen(job, stages)]


def at_endpoints(stages: Sequence[Stage]) -> list[str]:
    """The clients whose model an endpoint ran, which was sent their text."""
    return sorted({name for stage in stages for name, of in stage.plan.get("clients", {}).items() if of.get("endpoint")})


def where_text_went(stages: Sequence[Stage]) -> str:
    """Who was sent text, as a clause."""
    names = at_endpoints(stages)
    if not names:
        return "no text left its owner"
    return f"whoever runs the endpoint of {listed(names)} was sent text of that owner; beyond that no text left its owner"


def sent_in(stage: Stage) -> str:
    """What each client sent in a stage, as a phrase to follow "sent"."""
    if "discloses" not in stage.plan:
        return "data that is not listed in the plan"
    names: list[str] = [name for name in stage.plan["discloses"] if name not in APART]
    order = list(Disclosure.__members__)
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    phrases = [Disclosure[name].sentence if name in order else name for name in names]
    return listed(phrases, "; ", ", and " if len(phrases) == 2 else "; and ") or "nothing"


def noisy(stage: Stage) -> bool:
    """Whether noise was added to what clients sent, or to the sum of it."""
    return bool(stage.plan.get("noise")) or stage.config.get("epsilon") is not None


def _seen(job: Mapping[str, Any], stages: Sequence[Stage]) -> str:
    """A paragraph about who could see what clients sent, and whether noise was added."""
    if job.get("privacy", {}).get("secure_aggregation"):
        says = (
            "Secure aggregation was on: whoever ran the server saw sums over the clients in each stage, and not the numbers of "
            "any single client. The server did see the description that each client sent."
        )
    else:
        says = "Whoever ran the server could see what each client sent."
    with_noise = [stage.number for stage in stages if noisy(stage)]
    if not with_noise:
        return (
            f"{says} No noise was added: these numbers reveal less than the text, but they are computed from it, and "
            "there is no proof of privacy."
        )
    if len(with_noise) == len(stages):
        return f"{says} Noise was added; the privacy guarantee is stated below."
    numbers = listed([str(number) for number in with_noise])
    return f"{says} Noise was added in stage {numbers} only; its privacy guarantee is stated below."
