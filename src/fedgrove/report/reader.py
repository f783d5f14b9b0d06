"""Reads the files of a run folder into plain values. All reports use this reader."""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import Parts
from fedgrove.files import read_lines
from fedgrove.report.stage_reports import report_of
from fedgrove.report.summary import CENTRALIZED, PERPLEXITY, Stage, Summary, Traffic


class Measurement(NamedTuple):
    """What is measured; the fields are those of ``metrics.jsonl``, see :class:`fedgrove.events.Measured`."""

    stage: int | None
    round: int | None
    client: str | None
    name: str


def read(run: Path) -> Summary:
    """Reads a run folder.

    Unknown metrics are ignored, and messages of unknown kinds are only summed.

    Raises:
        FedgroveError: the folder is no run folder, or the run has not ended.
    """
    if not (run / "job.toml").is_file():
        raise FedgroveError(f"{run}: no run folder (it has no job.toml)")
    if not (run / "model").is_dir():
        from fedgrove.runfolder import unfinished  # slow: it imports torch, which a report does not need

        raise unfinished(run)
    job = read_job(run)
    stages = read_stages(run, job)
    files = _files(run, stages)
    traffic = _traffic(run)
    metrics = read_lines(run / "metrics.jsonl")
    values = _last(metrics)

    measured = _perplexities(values)
    dense = measured.get((None, None), {})
    after = {stage: of for (stage, client), of in sorted(measured.items(), key=str) if stage is not None and client is None}
    last = after.get(len(stages) - 1, {})
    texts = [text["name"] for text in job.get("evaluate", {}).get("data", [])]
    texts = [text for text in texts if text in dense and text in last]
    alone_stage = max((stage for stage, client in measured if stage in after and client is not None), default=None)
    alone = {
        client: of
        for (stage, client), of in sorted(measured.items(), key=str)
        if client is not None and stage == alone_stage and of.keys() >= set(texts)
    }

    inner = run / CENTRALIZED
    ended = (inner / "model").is_dir()  # it may still be running
    one_owner = {
        what.name: value
        for what, value in (_last(read_lines(inner / "metrics.jsonl")) if ended else {}).items()
        if what[:3] == (len(stages) - 1, None, None)
    }
    centralized = {name.removeprefix(PERPLEXITY): value for name, value in one_owner.items() if name.startswith(PERPLEXITY)}

    clients = {client["name"] for client in job.get("clients", [])} | {row.client for row in traffic}
    parameters, dtype = _weights(run / "model")
    return Summary(
        name=run.resolve().name,
        job=job,
        stages=stages,
        outcomes=[report_of(stage.kind).outcome(stage, files) for stage in stages],
        files=files,
        clients=sorted(clients.union(*(stage.clients for stage in stages))),
        texts=texts,
        dense=dense,
        after=after,
        alone=alone,
        alone_stage=alone_stage if alone else None,
        centralized=centralized if centralized.keys() >= set(texts) else {},
        centralized_measured=one_owner,
        examples=_examples(run),
        centralized_examples=_examples(inner).get((len(stages) - 1, None), {}) if ended else {},
        exports=read_exports(run),
        samples=read_json(run / "samples.json")["samples"] if (run / "samples.json").is_file() else [],
        rounds_measured={
            what: value for what, value in values.items() if what.round is not None or not what.name.startswith(PERPLEXITY)
        },
        traffic=traffic,
        dtype=dtype,
        parameters=parameters,
        model_bytes=_folder_bytes(run / "model"),
        packed_bytes=_folder_bytes(run / "packed") if (run / "packed").is_dir() else None,
        began=min((line["time"] for line in metrics), default=None),
        ended=max((line["time"] for line in metrics), default=None),
    )


def read_job(run: Path) -> dict[str, Any]:
    """The content of ``job.toml``."""
    return tomllib.loads((run / "job.toml").read_text(encoding="utf-8"))


def read_stages(run: Path, job: Mapping[str, Any]) -> list[Stage]:
    """The job's stages, with those plans that have been written."""
    plans = {plan["stage"]: plan for plan in map(read_json, run.glob("plan-*.json"))}
    return [Stage(number, table["kind"], table, plans.get(number, {})) for number, table in enumerate(job["stages"])]


def read_perplexities(run: Path) -> dict[tuple[int | None, str | None], dict[str, float]]:
    """Perplexity after whole stages, by (stage, client) and text."""
    return _perplexities(_last(read_lines(run / "metrics.jsonl")))


def read_exports(folder: Path) -> list[dict[str, Any]]:
    """The records of all exports in a folder that still exist, the smallest first; ``folder`` is added to each."""
    rows = []
    for file in sorted(folder.glob("*.export.json")):
        name = file.name.removesuffix(".export.json")
        if (folder / name).is_dir():
            rows.append({**read_json(file), "folder": name})
    return sorted(rows, key=lambda one: (one["bytes"], one["folder"]))


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file."""
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return value


def _files(run: Path, stages: Sequence[Stage]) -> dict[str, Any]:
    names = {name for stage in stages for name in report_of(stage.kind).FILES}
    return {name: read_json(run / name) for name in sorted(names) if (run / name).is_file()}


def _last(metrics: Sequence[Mapping[str, Any]]) -> dict[Measurement, float]:
    """What was measured. A resumed run may hold a measurement several times; the last one counts."""
    return {Measurement(*(line[field] for field in Measurement._fields)): line["value"] for line in metrics}


def _perplexities(measured: Mapping[Measurement, float]) -> dict[tuple[int | None, str | None], dict[str, float]]:
    values: dict[tuple[int | None, str | None], dict[str, float]] = {}
    for what, value in measured.items():
        if what.name.startswith(PERPLEXITY) and what.round is None:
            values.setdefault((what.stage, what.client), {})[what.name.removeprefix(PERPLEXITY)] = value
    return values


def _traffic(run: Path) -> list[Traffic]:
    """``ledger.jsonl``, summed by stage, round, client, direction and kind."""
    sums: dict[tuple[int, int, str, str, str], list[int]] = {}
    for line in read_lines(run / "ledger.jsonl"):
        key = (line["stage"], line["round"], line["client"], line["direction"], line["kind"])
        total = sums.setdefault(key, [0, 0])
        total[0] += 1
        total[1] += line["bytes"]
    return [Traffic(*key, *total) for key, total in sorted(sums.items())]


def _examples(run: Path) -> dict[tuple[int | None, str | None], dict[str, Parts]]:
    parts: dict[tuple[int | None, str | None], dict[str, Parts]] = {}
    for line in read_lines(run / "examples.jsonl"):
        parts.setdefault((line["stage"], line["client"]), {})[line["name"]] = line["parts"]
    return parts


def _weights(model: Path) -> tuple[int, str | None]:
    """The number of parameters of a model directory, and their most frequent dtype; reads the files' headers only."""
    by_dtype = Counter[str]()
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                tensor = opened.get_slice(name)
                by_dtype[str(tensor.get_dtype())] += math.prod(tensor.get_shape())
    return by_dtype.total(), max(by_dtype, key=lambda dtype: by_dtype[dtype], default=None)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
