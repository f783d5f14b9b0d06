"""Perplexity in the middle of a stage, and the windows of held-out text that every measurement uses."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from fedgrove.data.sources import facts_of
from fedgrove.data.windows import evaluation_windows
from fedgrove.events import Phase
from fedgrove.job.tables import Evaluate
from fedgrove.models.blocks import Decoder
from fedgrove.models.compute import dtype_of
from fedgrove.models.perplexity import perplexity
from fedgrove.models.stream import Checkpoint
from fedgrove.runfolder import RunFolder


def evaluate_round(model: Checkpoint, stage: int, round_: int, run: RunFolder, device: str = "cpu") -> None:
    """Writes ``perplexity/<text>`` of the model after a round. What is already in the metrics is not measured again."""
    done = {(line["stage"], line["round"], line["name"]) for line in run.metrics()}
    decoder = Decoder(model, device, dtype_of(run.job.evaluate.compute_dtype, device))
    windows = heldout_windows(model, run)
    for number, (name, texts) in enumerate(windows.items()):
        if (stage, round_, f"perplexity/{name}") not in done:
            phase = Phase("evaluate", stage=stage, round=round_, text=name, done=number, total=len(windows))
            measured = perplexity(decoder, texts, run.phase(phase))
            run.log(stage, round_, None, f"perplexity/{name}", measured)


def loss_after(run: RunFolder, stage: int, round_: int) -> float | None:
    """The mean over texts of the held-out loss after a round, in nats a token; None if it was not measured."""
    found = [
        math.log(line["value"])
        for line in run.metrics()
        if (line["stage"], line["round"], line["client"]) == (stage, round_, None) and line["name"].startswith("perplexity/")
    ]
    return sum(found) / len(found) if found else None


def heldout_windows(model: Checkpoint, run: RunFolder) -> dict[str, list[Tensor]]:
    """By name of the text, token ids (1, tokens) of each window, for the texts whose perplexity is measured."""
    wanted = run.job.evaluate
    return _tokenised(model.path, wanted, json.dumps([facts_of(text.path) for text in wanted.data]))


@lru_cache(maxsize=1)
def _tokenised(model: Path, wanted: Evaluate, facts: str) -> dict[str, list[Tensor]]:
    """The held-out texts as windows, cached because they are the same after every stage and round.

    ``facts`` is part of the cache's key, so that a file that changes is read again.
    """
    tokenizer = Checkpoint(model).tokenizer()
    return {
        text.name: evaluation_windows(text.path, text.text, tokenizer, wanted.length, wanted.windows)
        for text in wanted.data
        if text.measure == "perplexity"
    }
