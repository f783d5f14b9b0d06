"""What an owner who was not there gets of a finished pool, by a few windows of its text; nothing is trained.

Weights over the members come from the gate or from losses on these windows. "none" and "shared" are always candidates: who is
no better off with a mixture does not get one. One half of the windows chooses, the other half is reported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fedgrove.data.sources import DEFAULT_TEMPLATE
from fedgrove.data.windows import spread, training_windows, with_labels
from fedgrove.errors import FedgroveError
from fedgrove.evaluation.held_out import error_of_difference, mean_of
from fedgrove.events import Phase
from fedgrove.job.tables import Client, Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.options import By
from fedgrove.report.newcomers import NEW, NONE, SHARED
from fedgrove.runfolder import RunFolder
from fedgrove.stages.tune.personal import Windows
from fedgrove.stages.tune.pool.finished import Pool

MOST = 32  # windows that are measured
FEWEST = 4
MIXTURE = "mixture"  # the candidate of a gate
LIKE_NOTHING = 0.05  # a window with a smaller p-value is like nothing that the federation has


@dataclass(frozen=True)
class Adopted:
    """What an owner gets.

    Attributes:
        choice: "none", "shared", "mixture", or "member K".
        weights: over the members; empty for "none".
        losses: of each candidate, per token, on windows that it was not chosen by.
        error: standard error of the chosen one's loss minus that of "shared"; None for "shared" itself.
        unlike: the fraction of windows that are like nothing that the federation has; None: the gate does not say.
        windows: how many windows were used.
        forwards: forward passes of one window.
        seconds: that it took, without loading the model the first time.
        out: the adapter; None if none was written.
    """

    choice: str
    weights: tuple[float, ...]
    losses: dict[str, float]
    error: float | None
    unlike: float | None
    windows: int
    forwards: int
    seconds: float
    out: Path | None


def choose(pool: Pool, decoder: Decoder, windows: Windows, by: By | None = None, group: str | None = None) -> Adopted:
    """The mixture that suits an owner's windows; nothing is written.

    Args:
        decoder: the model that the pool was trained on.
        windows: (ids, labels), (windows, length) each: every other one chooses, the rest is reported.
        by, group: as for :func:`fedgrove.adopt.adopt`.

    Raises:
        FedgroveError: the pool has no such group, or its gate looks at no text.
    """
    began, forwards, unlike = time.monotonic(), 0, None
    ids, labels = windows
    candidates: dict[str, Sequence[float]] = {NONE: (), SHARED: pool.shares}
    number, by_losses = len(pool.members), by is By.losses or (by is None and pool.gives_one_member)
    with torch.no_grad():
        if group is not None:
            candidates[f"member {_member(pool, group)}"] = _only(_member(pool, group), number)
        elif by_losses:
            candidates |= {f"member {member}": _only(member, number) for member in range(number)}
        if group is None and (by is By.gate or (by is None and pool.gate)):
            weights, p = pool.look(decoder, list(ids))
            forwards = len(ids)
            unlike = None if p is None else float((p < LIKE_NOTHING).double().mean())
            if not by_losses:
                candidates[MIXTURE] = weights.mean(0).tolist()
        chosen_by, reported = (ids[::2], labels[::2]), (ids[1::2], labels[1::2])
        parts = {}
        for name, of in candidates.items():
            changes = pool.mix(of) if of else {}
            parts[name] = pool.losses(decoder, changes, chosen_by), pool.losses(decoder, changes, reported)
            forwards += len(ids)
    choice = min(candidates, key=lambda name: mean_of(parts[name][0]))
    return Adopted(
        choice=choice,
        weights=tuple(candidates[choice]),
        losses={name: mean_of(of[1]) for name, of in parts.items()},
        error=error_of_difference(parts[choice][1], parts[SHARED][1]) if choice != SHARED else None,
        unlike=unlike,
        windows=len(ids),
        forwards=forwards,
        seconds=time.monotonic() - began,
        out=None,
    )


def check_new(job: Job, length: int, model: Checkpoint) -> None:
    """Whether every owner of ``evaluate.new`` has enough text; before anything is trained.

    Args:
        length: tokens of a window.

    Raises:
        FedgroveError: one has not; names its file.
    """
    for owner in job.evaluate.new:
        few_windows(owner.data, _templates(owner), model.tokenizer(), length)


def evaluate_new(model: Checkpoint, stage: int, run: RunFolder, device: str) -> None:
    """Writes to ``RUN/new.json`` what each owner of ``evaluate.new`` would get from the pool that a stage has just written.

    Args:
        model: the model before the stage.
        device: the torch device.
    """
    owners = run.job.evaluate.new
    if not owners:
        return
    pool, decoder, tokenizer = Pool.read(run.path), Decoder(model, device), model.tokenizer()
    found = {}
    for number, owner in enumerate(owners):
        run.phase(Phase("evaluate", "owners who were not there", stage=stage, done=number, total=len(owners)))
        windows = few_windows(owner.data, _templates(owner), tokenizer, pool.facts["length"])
        found[owner.name] = {name: of for name, of in vars(choose(pool, decoder, windows)).items() if name != "out"}
    run.write_json(NEW, {"stage": stage, "owners": found})


def few_windows(
    data: Sequence[Path], templates: Mapping[str, str | None], tokenizer: PreTrainedTokenizerBase, length: int
) -> Windows:
    """At most ``MOST`` windows with something to predict, spread evenly over an owner's text: (ids, labels).

    Args:
        templates: ``text``, or ``prompt`` and ``answer``: how a record becomes text.
        length: tokens of a window.

    Raises:
        FedgroveError: there are fewer than ``FEWEST``; names the file.
    """
    given = {"text": templates["text"] or DEFAULT_TEMPLATE}
    if templates["prompt"] and templates["answer"]:
        given = {"prompt": templates["prompt"], "answer": templates["answer"]}
    few = f"{FEWEST} windows of {length} tokens are needed to choose by, and to report on others"
    try:
        ids, labels = training_windows(list(data), given, tokenizer, length)
    except FedgroveError as error:
        if "one window needs" in error.what:
            raise FedgroveError(f"{error.what}; {few}", "add text") from error
        raise
    learnt = with_labels(labels)
    if len(learnt) < FEWEST:
        raise FedgroveError(f"{data[0]}: {len(learnt)} windows; {few}", "add text")
    at = learnt[spread(min(MOST, len(learnt)), len(learnt))]
    return ids[at], labels[at]


def _templates(owner: Client) -> dict[str, str | None]:
    return {"text": owner.text, "prompt": owner.prompt, "answer": owner.answer}


def _member(pool: Pool, group: str) -> int:
    groups = pool.groups
    if group not in groups:
        known = f"choose one of {', '.join(groups)}" if groups else "leave --group out: the pool has none"
        raise FedgroveError(f"--group {group}: no such group", known)
    return groups.index(group)


def _only(member: int, members: int) -> list[float]:
    return [float(one == member) for one in range(members)]
