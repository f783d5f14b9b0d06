"""The page's section on quality: perplexity on held-out text of the dense, alone, centralized and federated models."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from markupsafe import Markup

from fedgrove.report import charts
from fedgrove.report.charts import Chart, Row, Scale
from fedgrove.report.paired import Interval, unclear
from fedgrove.report.sheet import Column, Spread, Table
from fedgrove.report.summary import Summary, geometric_mean
from fedgrove.report.words import between, change, ratio

MOST_COLUMNS = 5  # for more clients the table has three columns: lowest, mean, highest


def perplexity_chart(summary: Summary) -> Chart | None:
    """Each text's perplexities as relative differences from the dense model's; None if nothing was measured."""
    if not summary.texts:
        return None
    takes: list[tuple[str, Callable[[dict[str, float]], float], list[str]]] = [
        *((text, itemgetter(text), [text]) for text in summary.texts),
        ("geometric mean", summary.mean, summary.texts),
    ]
    sure = {text: summary.against_dense(texts) for text, _, texts in takes}
    scale = Scale.over(
        100 * (value - 1)
        for text, take, _ in takes
        for value in (
            *(take(of) / take(summary.dense) for of in (summary.federated, *summary.alone.values())),
            *([take(summary.centralized) / take(summary.dense)] if summary.centralized else []),
            *(sure[text] or ()),
        )
    )
    behind = charts.grid(scale)
    many = len(summary.alone) > 2 * MOST_COLUMNS

    def row(text: str, take: Callable[[dict[str, float]], float]) -> Row:
        dense, federated = take(summary.dense), take(summary.federated)
        alone = {client: take(of) for client, of in summary.alone.items()}

        def at(value: float) -> float:
            return 100 * (value / dense - 1)

        def says(who: str, value: float) -> str:
            return f"{text}: {who} {value:.2f}, {change(value / dense)} against dense {dense:.2f}"

        marks = [behind]
        if many:
            low, high, mean = min(alone.values()), max(alone.values()), sum(alone.values()) / len(alone)
            marks.append(charts.line(scale, at(low), at(high), "span", f"{text}: alone from {low:.2f} to {high:.2f}"))
            marks.append(charts.dot(scale, at(mean), "alone", says("alone, mean", mean)))
        for client, value in alone.items():
            if client == text:
                marks.append(charts.square(scale, at(value), "alone", says(f"{client} alone", value)))
            elif not many:
                marks.append(charts.dot(scale, at(value), "alone", says(f"{client} alone", value)))
        if summary.centralized:
            value = take(summary.centralized)
            marks.append(charts.tick(scale, at(value), "target", says("centralized", value)))
        interval = sure[text]
        if interval:
            low, high = (100 * (end - 1) for end in interval)
            marks.append(charts.line(scale, low, high, "sure", f"{text}: federated against dense{between(interval)}"))
        marks.append(charts.dot(scale, at(federated), "federated", says("federated", federated)))
        return Row(text, Markup("").join(marks), change(federated / dense))

    rows = [row(text, take) for text, take, _ in takes]
    legend = [("federated", "federated, and its 95 % interval" if any(sure.values()) else "federated")]
    if summary.centralized:
        legend.append(("target", "centralized"))
    if summary.owned:
        legend.append(("owner", "the text's owner, alone"))
    if summary.alone:
        legend.append(
            ("alone", "clients alone, mean and range" if many else "other clients, alone" if summary.owned else "clients alone")
        )
    return Chart(
        "dots",
        "Perplexity of the federated model against the dense one: " + "; ".join(f"{r.label} {r.value}" for r in rows) + ".",
        rows,
        charts.tick_labels(scale, [f"{value:+g}%".replace("-", "−") if value else "dense" for value in scale.ticks]),
        legend,
    )


def perplexities(summary: Summary) -> Table | None:
    """Perplexity by text (rows) and model (columns); None if nothing was measured."""
    if not summary.texts:
        return None
    clients = sorted(summary.alone)
    few = len(clients) <= MOST_COLUMNS
    last = max(summary.after)

    columns = [Column("held-out text"), Column("dense", perplexity_text)]
    if clients:
        named = [f"{client} alone" for client in clients] if few else ["alone, lowest", "alone, mean", "alone, highest"]
        columns += [Column(title, perplexity_text) for title in named]
        if summary.owned and not few:
            columns.append(Column("its owner alone", perplexity_text))
    if summary.centralized:
        columns.append(Column("centralized", perplexity_text))
    titles = [f"after stage {stage}" if stage != last else "federated" for stage in sorted(summary.after)]
    columns += [Column(title, perplexity_text) for title in titles]

    def row(name: str, take: Callable[[dict[str, float]], float | None], own: Any) -> list[Any]:
        alone = [take(summary.alone[client]) or 0.0 for client in clients]
        values: list[Any] = [name, take(summary.dense)]
        if clients:
            values += alone if few else [min(alone), sum(alone) / len(alone), max(alone)]
            if summary.owned and not few:
                values.append(own)
        values += [take(summary.centralized)] if summary.centralized else []
        return values + [take(summary.after[stage]) for stage in sorted(summary.after)]

    def of_text(text: str) -> list[Any]:
        owner = summary.owned.get(text)
        return row(text, lambda values: values.get(text), summary.alone[owner][text] if owner else None)

    def mean(values: dict[str, float]) -> float | None:
        return summary.mean(values) if values.keys() >= set(summary.texts) else None

    owned = [summary.alone[client][text] for text, client in summary.owned.items()]
    all_owned = len(owned) == len(summary.texts)
    return Table(
        "perplexity",
        "Perplexity on held-out text; lower is better",
        columns,
        [of_text(text) for text in summary.texts],
        [row("geometric mean", mean, geometric_mean(owned) if all_owned else None)],
    )


def differences(summary: Summary) -> Table | None:
    """The federated model's perplexity relative to the others', on each text, with intervals; None if not measured."""
    if not summary.texts:
        return None
    clients = sorted(summary.alone)

    def spread(value: float | None, of: float | None, interval: Interval | None) -> Spread | None:
        quotient = ratio(value, of)
        if quotient is None:
            return None
        low, high = interval or (None, None)
        around = f"{change(low)} to {change(high)}" if low is not None and high is not None else ""
        return Spread(quotient, low, high, change(quotient), f"{around}, not clear" if unclear(interval) else around)

    columns = [Column("held-out text"), Column("against dense", spread=True)]
    columns += [Column("against alone, mean", spread=True)] if clients else []
    columns += [Column("against its owner alone", spread=True)] if summary.owned else []
    columns += [Column("against centralized", spread=True)] if summary.centralized else []

    def row(name: str, texts: list[str], take: Callable[[dict[str, float]], float]) -> list[Any]:
        values: list[Any] = [name, spread(take(summary.federated), take(summary.dense), summary.against_dense(texts))]
        if clients:
            alone = sum(take(summary.alone[client]) for client in clients) / len(clients)
            values.append(spread(take(summary.together), alone, summary.against_alone(clients, texts)))
        if summary.owned:
            owner = summary.owned.get(name)
            alone_value = summary.alone[owner][name] if owner else None
            values.append(spread(take(summary.together), alone_value, summary.against_alone([owner], texts) if owner else None))
        if summary.centralized:
            interval = summary.against_centralized(texts)
            values.append(spread(take(summary.federated), take(summary.centralized), interval))
        return values

    rows = [row(text, [text], itemgetter(text)) for text in summary.texts]
    foot = [row("geometric mean", summary.texts, summary.mean)]
    return Table("differences", "The federated model’s perplexity against the others’", columns, rows, foot)


def alone(summary: Summary) -> Table | None:
    """Perplexity of every client alone on every text, as CSV, if there are too many clients for the table."""
    if len(summary.alone) <= MOST_COLUMNS:
        return None
    clients = sorted(summary.alone)
    rows = [[text, *(summary.alone[client][text] for client in clients)] for text in summary.texts]
    return Table("alone", "", [Column("held-out text"), *map(Column, clients)], rows)


def perplexity_text(value: float) -> str:
    """A perplexity as tables show it."""
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
