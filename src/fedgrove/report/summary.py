"""What a run folder says, in a few numbers."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgrove.errors import FedgroveError
from fedgrove.run import read_lines, unfinished


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
        job: the job as it ran.
        texts: the held-out texts, in the job's order.
        dense: perplexity of the model as it came, by text.
        federated: perplexity of the result, by text.
        alone: by client, perplexity by text of what it would have had without the others; empty if not measured.
        tensors: the records of ``pruning.json``.
        uplink: bytes that each client sent, by client.
        downlink: bytes that each client was sent, by client.
    """

    job: dict[str, Any]
    texts: list[str]
    dense: dict[str, float]
    federated: dict[str, float]
    alone: dict[str, dict[str, float]]
    tensors: list[dict[str, Any]]
    uplink: dict[str, int]
    downlink: dict[str, int]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among all pruned tensors."""
        pruned: int = sum(row["pruned"] for row in self.tensors)
        numel: int = sum(row["numel"] for row in self.tensors)
        return pruned / max(1, numel)

    def mean(self, values: dict[str, float]) -> float:
        """The geometric mean over the texts."""
        return geometric_mean([values[text] for text in self.texts])

    @property
    def alone_mean(self) -> float | None:
        """The mean over clients of what they have alone, each the geometric mean over the texts."""
        if not self.alone:
            return None
        return sum(self.mean(values) for values in self.alone.values()) / len(self.alone)

    def perplexities(self) -> dict[str, Any]:
        """Perplexity by model and text: dense, alone by client, federated."""
        return {"dense": self.dense, "alone": self.alone, "federated": self.federated}


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean of the logarithms."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def read(run: Path) -> Summary:
    """Reads a run folder.

    Raises:
        FedgroveError: it is no run folder, or the run has not ended.
    """
    if not (run / "job.toml").is_file():
        raise FedgroveError(f"{run}: no run folder (it has no job.toml)")
    if not (run / "pruning.json").is_file():
        raise FedgroveError(unfinished(run))
    job = tomllib.loads((run / "job.toml").read_text(encoding="utf-8"))
    metrics = [line for line in read_lines(run / "metrics.jsonl") if line["name"].startswith("perplexity/")]
    last = len(job["stages"]) - 1
    texts = [text["name"] for text in job.get("evaluate", {}).get("data", [])]

    def by_text(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
        return {line["name"].removeprefix("perplexity/"): line["value"] for line in lines}

    alone = sorted({line["client"] for line in metrics if line["client"] is not None and line["stage"] == last})
    ledger = read_lines(run / "ledger.jsonl")

    def sent(direction: str) -> dict[str, int]:
        total = {client["name"]: 0 for client in job["clients"]}
        for line in ledger:
            if line["direction"] == direction and line["kind"] == "prune":
                total[line["client"]] += line["bytes"]
        return total

    return Summary(
        job=job,
        texts=texts,
        dense=by_text(line for line in metrics if line["stage"] is None),
        federated=by_text(line for line in metrics if line["stage"] == last and line["client"] is None),
        alone={c: by_text(line for line in metrics if line["stage"] == last and line["client"] == c) for c in alone},
        tensors=json.loads((run / "pruning.json").read_text(encoding="utf-8"))["tensors"],
        uplink=sent("up"),
        downlink=sent("down"),
    )
