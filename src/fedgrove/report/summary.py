"""The one reader of a run folder: what its files say, as plain values. The table and the page show them."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import Parts
from fedgrove.report.paired import Interval, ratio_interval

CENTRALIZED = "centralized"  # the owner of all the text, and the folder of its run
PERPLEXITY = "perplexity/"
AROUND = frozenset({"card", "evaluate"})  # asks that go around the stages, not into their result
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # by the names that safetensors gives to dtypes


@dataclass(frozen=True)
class Traffic:
    """Messages of one client, of one kind and direction, in one round."""

    stage: int
    round: int
    client: str
    direction: str
    kind: str
    messages: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
        name: of the folder.
        job: the job as it ran.
        clients: everybody who was planned for, sent or received something, by name.
        texts: the held-out texts that were measured before and after, in the job's order.
        dense: perplexity of the model as it came, by text.
        after: by stage, perplexity by text of the model after it.
        alone: by client, perplexity by text of what it would have had without the others; empty if not measured.
        alone_stage: after which stage ``alone`` was measured; compare it with ``together``.
        centralized: perplexity by text of what one owner of all the text would have; empty if that was not run.
        centralized_measured: likewise everything else that was measured, by name.
        examples: (sum, how many) of each window or record that a measurement is the mean of, by (stage, client) and name.
        centralized_examples: likewise, by name.
        plans: ``plan-*.json``, by stage.
        tensors: the records of ``pruning.json``; empty if no stage prunes.
        history: a row for every stage, round and block of pruning, as ``pruning.json`` tells it.
        exports: what was measured of each form that was exported into the run folder; see :func:`read_exports`.
        samples: ``samples.json``: each prompt, and what the model wrote before and after.
        pruning: the rest of ``pruning.json``: the last stage that prunes.
        narrowing: ``structured.json``; empty if no stage narrows.
        rounds_measured: the metrics of single rounds and of clients, but perplexities: by (stage, round, client, name).
        traffic: the ledger, summed by stage, round, client, direction and kind.
        dtype: of the pruned matrices, as safetensors names it.
        parameters: of the result.
        model_bytes: all files of ``model/``.
        packed_bytes: all files of ``packed/``; None if the model was not exported so.
        began, ended: Unix times of the first and the last measurement; None without one.
    """

    name: str
    job: dict[str, Any]
    clients: list[str]
    texts: list[str]
    dense: dict[str, float]
    after: dict[int, dict[str, float]]
    alone: dict[str, dict[str, float]]
    alone_stage: int | None
    centralized: dict[str, float]
    centralized_measured: dict[str, float]
    examples: dict[tuple[int | None, str | None], dict[str, Parts]]
    centralized_examples: dict[str, Parts]
    plans: list[dict[str, Any]]
    tensors: list[dict[str, Any]]
    history: list[dict[str, Any]]
    exports: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    pruning: dict[str, Any]
    narrowing: dict[str, Any]
    rounds_measured: dict[tuple[int | None, int | None, str | None, str], float]
    traffic: list[Traffic]
    dtype: str | None
    parameters: int
    model_bytes: int
    packed_bytes: int | None
    began: float | None
    ended: float | None

    @property
    def federated(self) -> dict[str, float]:
        """Perplexity of the result, by text."""
        return self.after.get(self.last, {})

    @property
    def together(self) -> dict[str, float]:
        """Perplexity of the model that may be compared with ``alone``: the one after the same stage."""
        return self.federated if self.alone_stage is None else self.after[self.alone_stage]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among all pruned tensors."""
        pruned: int = sum(row["pruned"] for row in self.tensors)
        return pruned / max(1, self.numel)

    @property
    def numel(self) -> int:
        """Weights in all pruned tensors."""
        return sum(row["numel"] for row in self.tensors)

    @property
    def exact(self) -> bool:
        """Whether every tensor has the zeros that were asked for: the nearest whole number to the target, halves up."""
        return all(row["pruned"] == math.floor(row["target"] * row["numel"] + 0.5) for row in self.tensors)

    def mean(self, values: dict[str, float]) -> float:
        """The geometric mean over the texts."""
        return geometric_mean([values[text] for text in self.texts])

    @property
    def alone_mean(self) -> float | None:
        """The mean over clients of what they have alone, each the geometric mean over the texts."""
        if not self.alone:
            return None
        return sum(self.mean(values) for values in self.alone.values()) / len(self.alone)

    @property
    def owned(self) -> dict[str, str]:
        """The texts that belong to a client that was measured alone: those of its name. By text, the client."""
        return {text: text for text in self.texts if text in self.alone}

    def perplexities(self) -> dict[str, Any]:
        """Perplexity by model and text: dense, alone by client, federated."""
        found: dict[str, Any] = {"dense": self.dense, "alone": self.alone, "federated": self.federated}
        return found | ({"centralized": self.centralized} if self.centralized else {})

    @property
    def last(self) -> int:
        """The last stage."""
        return len(self.job["stages"]) - 1

    def against_dense(self, texts: Sequence[str]) -> Interval | None:
        """95 % of the result's perplexity divided by the dense model's; see :mod:`fedgrove.report.paired`."""
        return ratio_interval(self.windows(self.last), [self.windows(None)], texts)

    def against_alone(self, clients: Sequence[str], texts: Sequence[str]) -> Interval | None:
        """95 % of ``together`` divided by the mean of what these clients have alone."""
        alone = [self.windows(self.alone_stage, client) for client in clients]
        return ratio_interval(self.windows(self.last if self.alone_stage is None else self.alone_stage), alone, texts)

    def against_centralized(self, texts: Sequence[str]) -> Interval | None:
        """95 % of the result's perplexity divided by that of one owner of all the text."""
        return ratio_interval(self.windows(self.last), [_of_texts(self.centralized_examples)], texts)

    def windows(self, stage: int | None, client: str | None = None) -> dict[str, Parts]:
        """(Loss, tokens) of each window by text, of the model after a stage or of what a client has alone."""
        return _of_texts(self.examples.get((stage, client), {}))

    def sent(self, direction: str, *, around: bool = False) -> dict[str, int]:
        """Bytes "up" or "down" by client: of the stages' own work, or of the asks ``around`` it (cards, measurement)."""
        total = dict.fromkeys(self.clients, 0)
        for row in self.traffic:
            if row.direction == direction and (row.kind in AROUND) == around:
                total[row.client] += row.bytes
        return total

    def sent_by_round(self, direction: str) -> dict[tuple[int, int], dict[str, int]]:
        """Bytes "up" or "down" of the stages' own work, by (stage, round), then by client."""
        found: dict[tuple[int, int], dict[str, int]] = {}
        for row in self.traffic:
            if row.direction == direction and row.kind not in AROUND:
                by_client = found.setdefault((row.stage, row.round), {})
                by_client[row.client] = by_client.get(row.client, 0) + row.bytes
        return found

    @property
    def uplink(self) -> dict[str, int]:
        """Bytes of the stages' own work that each client sent."""
        return self.sent("up")

    @property
    def downlink(self) -> dict[str, int]:
        """Bytes of the stages' own work that each client was sent."""
        return self.sent("down")

    @property
    def rounds(self) -> list[tuple[int, int]]:
        """(stage, round) of every planned round of pruning."""
        return [(plan["stage"], round_) for plan in self.plans if plan["kind"] == "prune" for round_ in range(num_rounds(plan))]

    @property
    def dense_round_bytes(self) -> int:
        """What one client would send in a round of plain averaging: every pruned matrix, dense, in its own dtype."""
        return self.numel * _BYTES.get(self.dtype or "", 2)

    @property
    def dense_bytes(self) -> int:
        """The same in all rounds of pruning."""
        return self.dense_round_bytes * len(self.rounds)

    @cached_property
    def contributors(self) -> dict[tuple[int, int, int], list[str]]:
        """Whose work is in a block, by (stage, round, block).

        ``pruning.json`` tells who answered well; where it is of a fedgrove that told the last round only, the plan tells of
        the others who was asked.
        """
        found: dict[tuple[int, int, int], list[str]] = {}
        for plan in self.plans:
            for client, share in sorted(plan["clients"].items()):
                for round_, blocks in enumerate(share.get("blocks", ())):
                    for block in blocks:
                        found.setdefault((plan["stage"], round_, block), []).append(client)
        last = self.pruning.get("stage", 0)
        told = [*self.tensors, *self.history]
        return found | {(row.get("stage", last), row["round"], row["block"]): sorted(row["clients"]) for row in told}

    def unanswered(self, plan: dict[str, Any]) -> dict[str, int]:
        """Asks of a stage that a client did not answer, by client; only those with any.

        A block that was interrupted is asked and answered again, so this counts too few rather than too many.
        """
        answered: dict[str, int] = {}
        for row in self.traffic:
            if (row.stage, row.direction, row.kind) == (plan["stage"], "up", plan.get("ask", plan["kind"])):
                answered[row.client] = answered.get(row.client, 0) + row.messages
        asked = {client: sum(map(len, share.get("blocks", ()))) for client, share in sorted(plan["clients"].items())}
        missing = {client: number - answered.get(client, 0) for client, number in asked.items()}
        return {client: number for client, number in missing.items() if number > 0}


def num_rounds(plan: dict[str, Any]) -> int:
    """Rounds of a plan."""
    return max((len(share.get("blocks", ())) for share in plan["clients"].values()), default=0)


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean of the logarithms."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def read(run: Path) -> Summary:
    """Reads a run folder.

    Lines that say a thing again (a resumed run) count as the last one says; metrics and messages of kinds that are not
    known here are passed over or only summed.

    Raises:
        FedgroveError: it is no run folder, or the run has not ended.
    """
    if not (run / "job.toml").is_file():
        raise FedgroveError(f"{run}: no run folder (it has no job.toml)")
    if not (run / "model").is_dir():
        from fedgrove.runfolder import unfinished  # not above: it brings torch, and a report shall be there at once

        raise unfinished(run)
    job = tomllib.loads((run / "job.toml").read_text(encoding="utf-8"))
    plans = sorted((_json(file) for file in run.glob("plan-*.json")), key=lambda plan: plan["stage"])
    pruning = _json(run / "pruning.json") if (run / "pruning.json").is_file() else {}
    tensors, history = pruning.pop("tensors", []), pruning.pop("history", [])
    traffic = _traffic(_lines(run / "ledger.jsonl"))
    metrics = _lines(run / "metrics.jsonl")

    measured: dict[tuple[int | None, str | None], dict[str, float]] = {}
    for line in metrics:
        if line["name"].startswith(PERPLEXITY) and line["round"] is None:
            of_model = measured.setdefault((line["stage"], line["client"]), {})
            of_model[line["name"].removeprefix(PERPLEXITY)] = line["value"]
    dense = measured.get((None, None), {})
    after = {stage: of for (stage, client), of in sorted(measured.items(), key=str) if stage is not None and client is None}
    last = after.get(len(job["stages"]) - 1, {})
    texts = [text["name"] for text in job.get("evaluate", {}).get("data", [])]
    texts = [text for text in texts if text in dense and text in last]
    alone_stage = max((stage for stage, client in measured if stage in after and client is not None), default=None)
    alone = {
        client: of
        for (stage, client), of in sorted(measured.items(), key=str)
        if client is not None and stage == alone_stage and of.keys() >= set(texts)
    }

    inner = run / CENTRALIZED
    ended = (inner / "model").is_dir()  # it may be going on
    one_owner = {
        line["name"]: line["value"]
        for line in (_lines(inner / "metrics.jsonl") if ended else ())
        if (line["stage"], line["round"], line["client"]) == (len(job["stages"]) - 1, None, None)
    }
    centralized = {name.removeprefix(PERPLEXITY): value for name, value in one_owner.items() if name.startswith(PERPLEXITY)}
    examples = _examples(run)

    clients = {client["name"] for client in job.get("clients", [])} | {row.client for row in traffic}
    parameters, dtype = _weights(run / "model", {row["name"] for row in tensors})
    return Summary(
        name=run.resolve().name,
        job=job,
        clients=sorted(clients.union(*(plan["clients"] for plan in plans))),
        texts=texts,
        dense=dense,
        after=after,
        alone=alone,
        alone_stage=alone_stage if alone else None,
        centralized=centralized if centralized.keys() >= set(texts) else {},
        centralized_measured=one_owner,
        examples=examples,
        centralized_examples=_examples(inner).get((len(job["stages"]) - 1, None), {}) if ended else {},
        plans=plans,
        tensors=tensors,
        history=history,
        exports=read_exports(run),
        samples=_json(run / "samples.json")["samples"] if (run / "samples.json").is_file() else [],
        pruning=pruning,
        narrowing=_json(run / "structured.json") if (run / "structured.json").is_file() else {},
        rounds_measured={
            (line["stage"], line["round"], line["client"], line["name"]): line["value"]
            for line in metrics
            if line["round"] is not None or not line["name"].startswith(PERPLEXITY)
        },
        traffic=traffic,
        dtype=dtype,
        parameters=parameters,
        model_bytes=_folder_bytes(run / "model"),
        packed_bytes=_folder_bytes(run / "packed") if (run / "packed").is_dir() else None,
        began=min((line["time"] for line in metrics), default=None),
        ended=max((line["time"] for line in metrics), default=None),
    )


def read_exports(folder: Path) -> list[dict[str, Any]]:
    """Every export that lies in a folder and is still there, the smallest first; ``folder`` is added to each."""
    found = []
    for file in sorted(folder.glob("*.export.json")):
        name = file.name.removesuffix(".export.json")
        if (folder / name).is_dir():
            found.append({**_json(file), "folder": name})
    return sorted(found, key=lambda one: (one["bytes"], one["folder"]))


def _json(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return value


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if there is no file. What a kill cut short at its end is passed over."""
    if not file.is_file():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole if line]


def _examples(run: Path) -> dict[tuple[int | None, str | None], dict[str, Parts]]:
    found: dict[tuple[int | None, str | None], dict[str, Parts]] = {}
    for line in _lines(run / "examples.jsonl"):
        found.setdefault((line["stage"], line["client"]), {})[line["name"]] = line["parts"]
    return found


def _of_texts(examples: Mapping[str, Parts]) -> dict[str, Parts]:
    return {name.removeprefix(PERPLEXITY): parts for name, parts in examples.items() if name.startswith(PERPLEXITY)}


def _traffic(ledger: list[dict[str, Any]]) -> list[Traffic]:
    sums: dict[tuple[int, int, str, str, str], list[int]] = {}
    for line in ledger:
        key = (line["stage"], line["round"], line["client"], line["direction"], line["kind"])
        total = sums.setdefault(key, [0, 0])
        total[0] += 1
        total[1] += line["bytes"]
    return [Traffic(*key, *total) for key, total in sorted(sums.items())]


def _weights(model: Path, pruned: set[str]) -> tuple[int, str | None]:
    """Parameters of a model directory, and the dtype of its pruned tensors; from the files' headers alone."""
    parameters, dtype = 0, None
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                tensor = opened.get_slice(name)
                parameters += math.prod(tensor.get_shape())
                if name in pruned:
                    dtype = str(tensor.get_dtype())
    return parameters, dtype


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
