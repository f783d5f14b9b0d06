"""The report: one self-contained HTML page. This file combines its parts; each part has its own file."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from fedgrove.files import write_atomically
from fedgrove.report import measurements, quality, traffic
from fedgrove.report.disclosures import what_left
from fedgrove.report.owners import own_table
from fedgrove.report.reader import read
from fedgrove.report.sections import Figure, Section
from fedgrove.report.sheet import render
from fedgrove.report.stage_reports import report_of
from fedgrove.report.summary import Summary
from fedgrove.report.verdict import alone_means, one_owner, own_texts, verdict
from fedgrove.report.words import between, change, file_name, plural, size

PRIVATE = frozenset({"data", "path"})  # keys of the job whose values are paths of the machine that it ran on


def write_report(run: Path) -> Path:
    """Writes ``RUN/report.html``, atomically, from the files of the run folder alone.

    Raises:
        FedgroveError: the folder is no run folder, or the run has not ended.
    """
    out = run / "report.html"
    write_atomically(out, page(read(run)))
    return out


def page(summary: Summary) -> str:
    """The HTML page of a run."""
    return render(
        "page.html",
        page_name=summary.job["name"],
        run=summary,
        methods=[report_of(stage.kind).describe(stage.config) for stage in summary.stages],
        base=file_name(str(summary.job["model"]["path"])),
        ended=datetime.fromtimestamp(summary.ended, UTC) if summary.ended is not None else None,
        verdict=verdict(summary),
        own_texts=own_texts(summary),
        one_owner=one_owner(summary),
        alone_means=alone_means(summary),
        figures=figures(summary),
        perplexity_chart=quality.perplexity_chart(summary),
        perplexities=quality.perplexities(summary),
        differences=quality.differences(summary),
        owners=own_table(summary),
        alone=quality.alone(summary),
        measures=measurements.measures(summary),
        samples=summary.samples,
        samples_table=measurements.samples(summary),
        sections=stage_sections(summary),
        bytes_chart=traffic.bytes_chart(summary),
        bytes_map=traffic.bytes_map(summary),
        bytes_by_client=traffic.bytes_by_client(summary),
        bytes_by_round=traffic.bytes_by_round(summary),
        model=measurements.sizes(summary),
        exports=measurements.exports(summary),
        left=what_left(summary.job, summary.stages),
        notes=[note for stage in summary.stages for note in stage.plan.get("notes", ())],
        job=tomli_w.dumps(_without_folders(summary.job)),
        length=summary.job.get("evaluate", {}).get("length", 512),
        plural=plural,
        size=size,
    )


def stage_sections(summary: Summary) -> list[Section]:
    """The sections of all stages, in order."""
    return [section for stage in summary.stages for section in report_of(stage.kind).sections(summary, stage)]


def figures(summary: Summary) -> list[Figure]:
    """The large numbers at the top of the page."""
    figures = [figure for stage in summary.stages for figure in report_of(stage.kind).figures(summary, stage)]
    if summary.texts:
        dense, federated = summary.mean(summary.dense), summary.mean(summary.federated)
        figures.append(Figure(f"{federated:.1f}", "perplexity", f"dense {dense:.1f}, {change(federated / dense)}"))
    if summary.alone_mean is not None:
        ratio = summary.mean(summary.together) / summary.alone_mean
        interval = between(summary.against_alone(list(summary.alone), summary.texts))
        context = f"mean of {plural(len(summary.alone), 'client')}{interval}"
        figures.append(Figure(change(ratio), "perplexity against a client alone", context))
    sent = max(summary.uplink.values(), default=0)
    if sent:
        context = f"{sent / summary.dense_bytes:.2f} of dense weights" if summary.dense_bytes else ""
        figures.append(Figure(size(sent), "sent by a client, at most", context))
    packed = (
        size(summary.packed_bytes) + " packed" if summary.packed_bytes is not None else plural(summary.parameters, "weight")
    )
    figures.append(Figure(size(summary.model_bytes), "size of the model", packed))
    return figures


def _without_folders(value: Any, key: str = "") -> Any:
    """A copy of the job with file names instead of paths: the page may be shared, and folder names can be private."""
    if isinstance(value, dict):
        return {name: _without_folders(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part, key) for part in value]
    return file_name(value) if key in PRIVATE and isinstance(value, str) else copy.copy(value)
