"""An owner who was not there gets one adapter from a finished pool: no training, and nothing of its text leaves the machine.

Weights over the members come from the gate or from losses on a few windows. "none" and "shared" are always candidates: who is
no better off with a mixture does not get one. One half of the windows chooses, the other half is reported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedgrove.data.sources import DEFAULT_TEMPLATE, read_texts
from fedgrove.data.tokens import encode_prompt
from fedgrove.data.windows import spread, training_windows, with_labels
from fedgrove.errors import FedgroveError
from fedgrove.evaluation.held_out import error_of_difference, mean_of
from fedgrove.options import By
from fedgrove.stages.tune.pool.finished import Pool

MOST = 32  # windows that are measured
FEWEST = 4
NONE, SHARED, MIXTURE = "none", "shared", "mixture"
LIKE_NOTHING = 0.05  # a window with a smaller p-value is like nothing that the federation has


@dataclass(frozen=True)
class Adopted:
    """What an owner gets.

    Attributes:
        choice: "none", "shared", "mixture", or "member K".
        weights: over the members; empty for "none".
        losses: of each candidate, per token, on windows that it was not chosen by.
        error: standard error of the chosen one's loss minus that of "none".
        unlike: the fraction of windows that are like nothing that the federation has; None: the gate does not say.
        windows: how many windows were used.
        forwards: forward passes of one window.
        seconds: that it took, without loading the model the first time.
        out: the adapter; None if the choice is "none".
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


def adopt(
    run: Path,
    data: Sequence[Path],
    out: Path,
    *,
    by: By | None = None,
    group: str | None = None,
    model: str | None = None,
    text: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
) -> Adopted:
    """Finds the mixture of a pool's members that suits an owner's text, and writes it as one PEFT adapter.

    Args:
        run: the run folder.
        data: the owner's text.
        out: the folder of the adapter; an existing one is refused.
        by: ``gate``: the weights that the gate gives its text, one candidate; ``losses``: every member is a candidate. Default:
            the gate, if it looks at text.
        group: the owner's group, for gate "groups": its member is the candidate.
        model: the model that the pool was trained on; default: that of the job.
        text, prompt, answer: how a record becomes text; see the job's ``clients``.

    Raises:
        FedgroveError: the run has no pool, the model is another one, or there is too little text; in one line.
    """
    pool = Pool.read(run)
    if out.exists():
        raise FedgroveError(f"--out {out}: it exists already", "name another folder")
    decoder = pool.model(model, _device())
    ids, labels = _windows(pool, data, decoder.checkpoint.tokenizer(), {"text": text, "prompt": prompt, "answer": answer})
    began, forwards, unlike = time.monotonic(), 0, None
    candidates: dict[str, Sequence[float]] = {NONE: (), SHARED: pool.shares}
    number = len(pool.members)
    with torch.no_grad():
        if group is not None:
            candidates[f"member {_member(pool, group)}"] = _only(_member(pool, group), number)
        elif by is By.losses or (by is None and not pool.gate):
            candidates |= {f"member {member}": _only(member, number) for member in range(number)}
        else:
            weights, p = pool.look(decoder, list(ids))
            candidates[MIXTURE] = weights.mean(0).tolist()
            unlike, forwards = float((p < LIKE_NOTHING).double().mean()), len(ids)
        chosen_by, reported = (ids[::2], labels[::2]), (ids[1::2], labels[1::2])
        parts = {}
        for name, of in candidates.items():
            changes = pool.mix(of) if of else {}
            parts[name] = pool.losses(decoder, changes, chosen_by), pool.losses(decoder, changes, reported)
            forwards += len(ids)
    choice = min(candidates, key=lambda name: mean_of(parts[name][0]))
    seconds = time.monotonic() - began
    if choice != NONE:
        pool.write(out, decoder, pool.mix(candidates[choice]), f"{run.name}: {choice}")
    return Adopted(
        choice=choice,
        weights=tuple(candidates[choice]),
        losses={name: mean_of(of[1]) for name, of in parts.items()},
        error=error_of_difference(parts[choice][1], parts[NONE][1]) if choice != NONE else None,
        unlike=unlike,
        windows=len(ids),
        forwards=forwards,
        seconds=seconds,
        out=None if choice == NONE else out,
    )


def look(run: Path, data: Path, *, text: str | None = None, model: str | None = None, most: int | None = None) -> Looked:
    """What the gate of a pool says of texts, as those of one owner.

    Args:
        data: each record is a text.
        most: only the first texts.

    Raises:
        FedgroveError: as :func:`adopt`; or the gate looks at no text.
    """
    pool = Pool.read(run)
    decoder = pool.model(model, _device())
    tokenizer = decoder.checkpoint.tokenizer()
    texts = list(islice(read_texts(data, text, tokenizer), most))
    windows = [torch.tensor(encode_prompt(one, tokenizer)[: pool.settings.prefix], dtype=torch.int64) for one in texts]
    if not windows or not all(len(ids) for ids in windows):
        raise FedgroveError(f"{data}: it holds no text, or an empty one")
    with torch.no_grad():
        weights, p = pool.look(decoder, windows)
    return Looked(texts, weights, p)


@dataclass(frozen=True)
class Looked:
    """What a gate says of texts.

    Attributes:
        texts: the texts.
        weights: (texts, members) float64; each row adds up to 1.
        p: (texts,) float64: the part of the federation's windows that are as unusual, or more so.
    """

    texts: list[str]
    weights: Tensor
    p: Tensor


def _windows(
    pool: Pool, data: Sequence[Path], tokenizer: PreTrainedTokenizerBase, templates: Mapping[str, str | None]
) -> tuple[Tensor, Tensor]:
    """At most ``MOST`` windows with something to predict, spread evenly over the text."""
    length = pool.facts["length"]
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


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _member(pool: Pool, group: str) -> int:
    groups = sorted(pool.settings.groups)
    if group not in groups:
        known = f"choose one of {', '.join(groups)}" if groups else "leave --group out: the pool has none"
        raise FedgroveError(f"--group {group}: no such group", known)
    return groups.index(group)


def _only(member: int, members: int) -> list[float]:
    return [float(one == member) for one in range(members)]
