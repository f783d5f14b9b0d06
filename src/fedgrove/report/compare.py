"""Compares several runs: one HTML page and one table for a terminal, from their run folders alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table
from markupsafe import Markup
from rich.text import Text

from fedgrove.errors import FedgroveError
from fedgrove.files import write_atomically
from fedgrove.report import charts
from fedgrove.report.charts import Chart, Row, Scale
from fedgrove.report.paired import ratio_interval, unclear
from fedgrove.report.quality import perplexity_text
from fedgrove.report.reader import read
from fedgrove.report.sheet import Column, Table, render
from fedgrove.report.summary import Summary, geometric_mean
from fedgrove.report.words import change, file_name, plural, size

FEWER = 0.99  # a run with more than this fraction of the next run's bytes is not reported as sending fewer
PATHS = frozenset({"data", "path"})  # keys of the job whose values are paths of the machine that it ran on


def write_comparison(runs: Sequence[Path], out: Path) -> dict[str, Summary]:
    """Writes a page that compares runs, atomically.

    Args:
        runs: two or more run folders.
        out: the file.

    Returns:
        The runs by their names on the page.

    Raises:
        FedgroveError: a folder is no run folder, a run has not ended, or a folder is given twice.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise FedgroveError("report: a run is given twice", "give each folder once")
    summaries = dict(zip(names(runs), map(read, runs), strict=True))
    write_atomically(out, page(summaries))
    return summaries


def names(runs: Sequence[Path]) -> list[str]:
    """Names for run folders: their own names, with as many parent folders as needed to make them unique."""
    parts = [run.resolve().parts for run in runs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return [os.path.join(*part[-depth:]) for part in parts]  # noqa: PTH118 (parts, not a path that is opened)


def page(runs: Mapping[str, Summary]) -> str:
    """The HTML page.

    Args:
        runs: two or more, by name.
    """
    texts = shared_texts(runs)
    others = sorted({text for run in runs.values() for text in run.texts} - set(texts))
    says = f"Compared on {plural(len(texts), 'text')} that all of these runs measured." if texts else ""
    if others:
        says += f" Left out because not every run measured them in the same way: {', '.join(others)}."
    return render(
        "compare.html",
        page_name="runs",
        runs=list(runs),
        says=_verdict(runs, texts),
        texts_say=says.strip(),
        chart_of_runs=_chart(runs, texts) if texts else None,
        quality=quality(runs, texts),
        cost=cost(runs),
        settings=settings(runs),
        command="fedgrove report " + " ".join(runs),
    )


def shared_texts(runs: Mapping[str, Summary]) -> list[str]:
    """The held-out texts that every run measured in the same way: the same file name, template, windows and their length."""

    def measured(run: Summary) -> dict[str, Any]:
        wanted = run.job.get("evaluate", {})
        how = (wanted.get("length", 512), wanted.get("windows"))
        texts = {text["name"]: (file_name(str(text["path"])), text.get("text"), how) for text in wanted.get("data", [])}
        return {text: texts[text] for text in run.texts}

    first, *others = map(measured, runs.values())
    return [text for text, how in first.items() if all(other.get(text) == how for other in others)]


def quality(runs: Mapping[str, Summary], texts: Sequence[str]) -> Table:
    """Perplexity by text (rows) and run (columns); one column for the dense model if it is the same in all runs."""

    first = next(iter(runs.values()))
    same = all(run.dense[text] == first.dense[text] for run in runs.values() for text in texts)
    columns, sources = [Column("held-out text")], []
    for name, run in runs.items():
        if not same:
            columns.append(Column(f"{name}: dense", perplexity_text))
            sources.append(run.dense)
        elif run is first:
            columns.append(Column("dense", perplexity_text))
            sources.append(run.dense)
        columns.append(Column(name, perplexity_text))
        sources.append(run.federated)
    rows = [[text, *(source[text] for source in sources)] for text in texts]
    mean = ["geometric mean", *(geometric_mean([source[text] for text in texts]) for source in sources)]
    return Table("quality", "Perplexity on held-out text; lower is better", columns, rows, [mean] if texts else [])


def cost(runs: Mapping[str, Summary]) -> Table:
    """Size, bytes and time: a row for each run."""
    percent = "{:.1%}".format
    columns = [
        Column("run"),
        Column("clients", "{:,}".format),
        Column("weights", "{:,}".format),
        Column("zeros", percent),
        Column("model", size),
        Column("packed", size),
        Column("sent by a client, at most", size),
        Column("sent by all", size),
        Column("received by all", size),
        Column("time", _seconds),
        Column("time, modeled", _seconds),
    ]
    rows = []
    for name, run in runs.items():
        up, down = run.uplink, run.downlink
        clocks = [value for (_, round_, client, what), value in run.rounds_measured.items()
                  if what == "clock" and round_ is not None and client is None]  # fmt: skip
        time = run.ended - run.began if run.ended is not None and run.began is not None else None
        sent = [max(up.values(), default=0), sum(up.values()), sum(down.values())]
        rows.append(
            [name, len(run.clients), run.parameters, run.sparsity if run.pruned_weights else None, run.model_bytes,
             run.packed_bytes, *sent, time, max(clocks, default=None)]
        )  # fmt: skip
    used = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    return Table(
        "cost",
        "Size of the models, and the cost of the runs",
        [columns[i] for i in used],
        [[r[i] for i in used] for r in rows],
    )


def settings(runs: Mapping[str, Summary]) -> Table:
    """Keys of the jobs (rows) that are not the same in all runs (columns)."""
    flat = {name: _flat(run.job) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for of in flat.values() for key in of))
    rows = []
    for key in keys:
        values = [of.get(key) for of in flat.values()]
        if any(value != values[0] for value in values):
            rows.append([key, *values])
    return Table("settings", "Keys of the jobs that differ", [Column("key"), *map(Column, runs)], rows)


def comparison_table(runs: Mapping[str, Summary]) -> rich.table.Table:
    """For a terminal: a row for each run. The page also has the single texts."""
    texts = shared_texts(runs)
    over = f"; perplexity is the mean over {len(texts)} held-out texts, lower is better" if texts else ""
    table = rich.table.Table(title=f"Runs compared{over}", title_justify="left")
    table.add_column("run")
    for heading in ("perplexity", "against dense", "zeros", "model", "sent by all"):
        table.add_column(Text(heading), justify="right")
    for name, run in runs.items():
        after, before = ([of[text] for text in texts] for of in (run.federated, run.dense))
        mean = geometric_mean(after)
        table.add_row(
            Text(name),
            f"{mean:.1f}" if texts else "–",
            change(mean / geometric_mean(before)) if texts else "–",
            f"{run.sparsity:.1%}" if run.pruned_weights else "–",
            size(run.model_bytes),
            size(sum(run.uplink.values())),
        )
    return table


def _verdict(runs: Mapping[str, Summary], texts: Sequence[str]) -> str:
    if not texts:
        return "These runs share no held-out text that was measured in the same way, so it is unknown which model is better."
    means = {name: geometric_mean([run.federated[text] for text in texts]) for name, run in runs.items()}
    best, worst = min(means, key=lambda name: means[name]), max(means, key=lambda name: means[name])
    over = plural(len(texts), "text") + " held out"
    if means[best] == means[worst]:
        return f"All have the same perplexity over {over}: {means[best]:.1f}."
    says = f"Over {over}, {best} has the lowest perplexity, {means[best]:.1f}; {worst} the highest, {means[worst]:.1f}"
    interval = ratio_interval([runs[worst].windows(runs[worst].last)], [runs[best].windows(runs[best].last)], texts)
    sure = f", 95 %: {change(interval[0])} to {change(interval[1])}" if interval else ""
    says += f" ({change(means[worst] / means[best])}{sure})"
    says += ": no clear difference." if unclear(interval) else "."
    (lightest, sent), (_, next_sent), *_ = sorted(((name, sum(run.uplink.values())) for name, run in runs.items()), key=_bytes)
    if sent < FEWER * next_sent:
        says += f" The clients sent the fewest bytes in {lightest}: {size(sent)} together."
    return says


def _bytes(sent: tuple[str, int]) -> int:
    return sent[1]


def _chart(runs: Mapping[str, Summary], texts: Sequence[str]) -> Chart:
    """Each run's perplexities as relative differences from its dense model's."""

    def at(value: float, dense: float) -> float:
        return 100 * (value / dense - 1)

    scale = Scale.over(at(run.federated[text], run.dense[text]) for run in runs.values() for text in texts)
    rows = []
    for name, run in runs.items():
        places = {text: at(run.federated[text], run.dense[text]) for text in texts}
        marks = [charts.grid(scale), charts.line(scale, min(places.values()), max(places.values()), "span")]
        for text, place in places.items():
            says = f"{name}: {text} {run.federated[text]:.2f}, {change(1 + place / 100)} against dense {run.dense[text]:.2f}"
            marks.append(charts.dot(scale, place, "alone", says))
        ratio = geometric_mean([run.federated[text] / run.dense[text] for text in texts])
        marks.append(charts.dot(scale, 100 * (ratio - 1), "federated", f"{name}: mean {change(ratio)}"))
        rows.append(Row(name, Markup("").join(marks), change(ratio)))
    alt = "Perplexity against the dense model: " + "; ".join(f"{row.label} {row.value}" for row in rows) + "."
    labels = [f"{value:+g}%".replace("-", "−") if value else "dense" for value in scale.ticks]
    legend = [("federated", "geometric mean"), ("alone", "each text")]
    return Chart("dots", alt, rows, charts.tick_labels(scale, labels), legend)


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """A job as strings by dotted key, such as ``stages.0.sparsity``. Paths are shortened to file names."""
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = [(str(i), part) for i, part in enumerate(value)]
    else:
        inner = [value] if not isinstance(value, list) else value
        if key.rpartition(".")[2] in PATHS:
            inner = [file_name(str(part)) for part in inner]
        return {key: ", ".join(str(part).lower() if isinstance(part, bool) else str(part) for part in inner)}
    settings: dict[str, str] = {}
    for name, part in parts:
        settings |= _flat(part, f"{key}.{name}" if key else name)
    return settings


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:,.1f} s"
    return f"{value / 60:,.1f} min" if value < 7200 else f"{value / 3600:,.1f} h"
