"""An owner who was not there gets one adapter from a finished pool: no training, and nothing of its text leaves the machine.

How its weights over the members are chosen is in :mod:`fedgrove.stages.tune.pool.newcomers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from fedgrove.data.sources import read_texts
from fedgrove.data.tokens import encode_prompt
from fedgrove.errors import FedgroveError
from fedgrove.options import By
from fedgrove.report.newcomers import NONE
from fedgrove.stages.tune.pool.finished import Pool
from fedgrove.stages.tune.pool.newcomers import Adopted, choose, few_windows


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
            the gate, if it looks at single windows.
        group: the owner's group, for gate "groups", or a client of the run, for "user_centric": its member is the candidate.
        model: the model that the pool was trained on; default: that of the job.
        text, prompt, answer: how a record becomes text; see the job's ``clients``.

    Raises:
        FedgroveError: the run has no pool, the model is another one, or there is too little text; in one line.
    """
    pool = Pool.read(run)
    if (prompt is None) != (answer is None):
        raise FedgroveError("--prompt and --answer: give both, or neither")
    if out.exists():
        raise FedgroveError(f"--out {out}: it exists already", "name another folder")
    decoder = pool.model(model, _device())
    tokenizer = decoder.checkpoint.tokenizer()
    windows = few_windows(data, {"text": text, "prompt": prompt, "answer": answer}, tokenizer, pool.facts["length"])
    found = choose(pool, decoder, windows, by, group)
    if found.choice == NONE:
        return found
    pool.write(out, decoder, pool.mix(found.weights), f"{run.name}: {found.choice}", model)
    return replace(found, out=out)


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
        p: (texts,) float64: the part of the federation's windows that are as unusual, or more so; None: see
            :meth:`fedgrove.stages.tune.pool.finished.Pool.look`.
    """

    texts: list[str]
    weights: Tensor
    p: Tensor | None


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
