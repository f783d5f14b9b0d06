"""What is gained if the questions that a small model is least sure of go to a large one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.examiner import Examiner
from fedgrove.evaluation.metrics import read_pairs
from fedgrove.evaluation.metrics.accuracy import possible
from fedgrove.evaluation.routing import SHARES, Routing, routing
from fedgrove.events import Listener, Phase, announce
from fedgrove.export import find_named


def route(
    small: str | Path,
    large: str | Path,
    data: Sequence[Path],
    *,
    prompt: str,
    answer: str,
    private: Sequence[Path] = (),
    labels: Sequence[str] = (),
    shares: Sequence[float] = (),
    length: int = 512,
    records: int | None = None,
    listener: Listener | None = None,
) -> Routing:
    """Answers records with a small and with a large model, and measures what the small one's confidence is worth.

    The models are in memory one after the other.

    Args:
        small, large: a run folder, a model directory or a hub id.
        data: records that may be escalated.
        private: records that may not: only the small model answers them, and the large one never sees them.
        prompt, answer: how a record becomes a prompt and the correct answer.
        labels: all possible answers; default: all answers that occur.
        shares: the fractions of all records, between 0 and 1, that are escalated; default: 0.1, 0.2, 0.3, 0.5.
        length: tokens of a prompt with its label.
        records: the most records of each file.
        listener: what is told of the progress.

    Raises:
        FedgroveError: an error that the user can fix, in one line.
    """
    folders = [find_named(model).resolve() for model in (small, large)]
    if folders[0] == folders[1]:
        raise FedgroveError(f"{small} and {large} are the same model", "name two models")
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong:
        raise FedgroveError(f"--share {wrong[0]:g}: give a fraction above 0, up to 1")
    choices, found = list(labels), []
    for folder, files in zip(folders, ([*data, *private], data), strict=True):
        examiner = Examiner.of(folder, length, "cuda" if torch.cuda.is_available() else "cpu")
        pairs = [pair for file in files for pair in read_pairs(file, prompt, answer, examiner.tokenizer, records)]
        choices = possible(choices, pairs)
        on_progress = announce(listener or Listener(), Phase("evaluate", f"{folder} answers"))
        found.append(examiner.choices(pairs, choices, length, on_progress))
    first, second = found
    return routing(first.confidence, first.correct, second.correct, shares or SHARES)
