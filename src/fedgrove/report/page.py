"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import tomli_w
from markupsafe import Markup

from fedgrove.report import charts, words
from fedgrove.report.charts import Chart, Row, Scale
from fedgrove.report.exports import mean_perplexity, mean_ratio
from fedgrove.report.paired import Interval, difference_interval, unclear
from fedgrove.report.sheet import LONG, Column, Spread, Table, render
from fedgrove.report.summary import Summary, geometric_mean, num_rounds, read
from fedgrove.report.tuning import Tuning
from fedgrove.report.words import change, file_name, plural, ranges, size

MOST_COLUMNS = 5  # more clients than this share three columns: lowest, mean, highest
PRIVATE = frozenset({"data", "path"})  # keys of the job that hold paths of the machine it ran on


def write_report(run: Path) -> Path:
    """Writes ``RUN/report.html``, whole or not at all, from the files of the run folder alone.

    Raises:
        FedgroveError: it is no run folder, or the run has not ended.
    """
    beside, out = run / "report.html.partial", run / "report.html"
    beside.write_text(page(read(run)), encoding="utf-8")
    beside.replace(out)
    return out


def page(summary: Summary) -> str:
    """The page of a run."""
    return render(
        "page.html",
        page_name=summary.job["name"],
        run=summary,
        methods=[words.method(stage) for stage in summary.job["stages"]],
        base=file_name(str(summary.job["model"]["path"])),
        ended=datetime.fromtimestamp(summary.ended, UTC) if summary.ended is not None else None,
        verdict=words.verdict(summary),
        own_texts=words.own_texts(summary),
        one_owner=words.one_owner(summary),
        figures=_figures(summary),
        perplexity_chart=_perplexity_chart(summary),
        perplexities=_perplexities(summary),
        differences=_differences(summary),
        alone=_alone(summary),
        block_chart=_block_chart(summary),
        agreement_map=_agreement_map(summary),
        agreement_says=_agreement_says(summary),
        blocks=_blocks(summary),
        tensors=_tensors(summary),
        stages=[_Stage(summary, plan) for plan in summary.plans if plan["kind"] == "prune"],
        tunings=[Tuning(summary, plan) for plan in summary.plans if plan["kind"] == "tune"],
        bytes_chart=_bytes_chart(summary),
        bytes_map=_bytes_map(summary),
        bytes_by_client=_bytes_by_client(summary),
        bytes_by_round=_bytes_by_round(summary),
        narrowed=_narrowed(summary),
        other_type=words.other_type(summary.narrowing["types"]) if summary.narrowing else "",
        model=_model(summary),
        exports=_exports(summary),
        measures=_measures(summary),
        samples=summary.samples,
        samples_table=_samples(summary),
        left=words.left(summary),
        job=tomli_w.dumps(_without_folders(summary.job)),
        length=summary.job.get("evaluate", {}).get("length", 512),
        plural=plural,
        size=size,
    )


def _figures(summary: Summary) -> list[tuple[str, str, str]]:
    """(number, what it is, beside what), for the top of the page."""
    figures = []
    if summary.tensors:
        figures.append(
            (f"{summary.sparsity:.1%}", "of the weights are zero", f"in {plural(len(summary.tensors), 'matrix pruned')}")
        )
    if summary.narrowing:
        before, after = summary.narrowing["parameters"]
        figures.append((f"{after / before:.1%}", "of the weights are left", f"{after:,} of {before:,}"))
    if summary.texts:
        dense, federated = summary.mean(summary.dense), summary.mean(summary.federated)
        figures.append((f"{federated:.1f}", "perplexity", f"dense {dense:.1f}, {change(federated / dense)}"))
    if summary.alone_mean is not None:
        ratio = summary.mean(summary.together) / summary.alone_mean
        sure = words.between(summary.against_alone(list(summary.alone), summary.texts))
        beside = f"mean of {plural(len(summary.alone), 'client')}{sure}"
        figures.append((change(ratio), "perplexity against a client alone", beside))
    sent = max(summary.uplink.values(), default=0)
    if sent:
        beside = f"{sent / summary.dense_bytes:.2f} of dense weights" if summary.dense_bytes else ""
        figures.append((size(sent), "sent by a client, at most", beside))
    packed = (
        size(summary.packed_bytes) + " packed" if summary.packed_bytes is not None else plural(summary.parameters, "weight")
    )
    figures.append((size(summary.model_bytes), "size of the model", packed))
    return figures


def _perplexity_chart(summary: Summary) -> Chart | None:
    """Each text's perplexities as differences to the dense model's."""
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
                marks.append(charts.square(scale, at(value), "own", says(f"{client} alone", value)))
            elif not many:
                marks.append(charts.dot(scale, at(value), "alone", says(f"{client} alone", value)))
        if summary.centralized:
            value = take(summary.centralized)
            marks.append(charts.tick(scale, at(value), "target", says("centralized", value)))
        interval = sure[text]
        if interval:
            low, high = (100 * (end - 1) for end in interval)
            marks.append(charts.line(scale, low, high, "sure", f"{text}: federated against dense{words.between(interval)}"))
        marks.append(charts.dot(scale, at(federated), "federated", says("federated", federated)))
        return Row(text, Markup("").join(marks), change(federated / dense))

    rows = [row(text, take) for text, take, _ in takes]
    legend = [("federated", "federated, and its 95 % interval" if any(sure.values()) else "federated")]
    if summary.centralized:
        legend.append(("target", "centralized"))
    if summary.owned:
        legend.append(("own", "the text's owner, alone"))
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


def _perplexities(summary: Summary) -> Table | None:
    if not summary.texts:
        return None
    clients = sorted(summary.alone)
    few = len(clients) <= MOST_COLUMNS
    last = max(summary.after)

    def number(value: float) -> str:
        return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"

    columns = [Column("held-out text"), Column("dense", number)]
    if clients:
        named = [f"{client} alone" for client in clients] if few else ["alone, lowest", "alone, mean", "alone, highest"]
        columns += [Column(title, number) for title in named]
        if summary.owned and not few:
            columns.append(Column("its owner alone", number))
    if summary.centralized:
        columns.append(Column("centralized", number))
    columns += [Column(f"after stage {stage}" if stage != last else "federated", number) for stage in sorted(summary.after)]

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


def _differences(summary: Summary) -> Table | None:
    """What the federated model is against the others, on each text, and how sure that is."""
    if not summary.texts:
        return None
    clients = sorted(summary.alone)

    def spread(value: float | None, of: float | None, interval: Interval | None) -> Spread | None:
        ratio = _ratio(value, of)
        if ratio is None:
            return None
        low, high = interval or (None, None)
        around = f"{change(low)} to {change(high)}" if low is not None and high is not None else ""
        return Spread(ratio, low, high, change(ratio), f"{around}, not clear" if unclear(interval) else around)

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
            own = summary.alone[owner][name] if owner else None
            values.append(spread(take(summary.together), own, summary.against_alone([owner], texts) if owner else None))
        if summary.centralized:
            interval = summary.against_centralized(texts)
            values.append(spread(take(summary.federated), take(summary.centralized), interval))
        return values

    rows = [row(text, [text], itemgetter(text)) for text in summary.texts]
    foot = [row("geometric mean", summary.texts, summary.mean)]
    return Table("differences", "The federated model’s perplexity against the others’", columns, rows, foot)


def _alone(summary: Summary) -> Table | None:
    """Every client alone on every text, where the table of perplexities has no room for it: only as CSV."""
    if len(summary.alone) <= MOST_COLUMNS:
        return None
    clients = sorted(summary.alone)
    rows = [[text, *(summary.alone[client][text] for client in clients)] for text in summary.texts]
    return Table("alone", "", [Column("held-out text"), *map(Column, clients)], rows)


def _by_block(summary: Summary) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in summary.tensors:
        found.setdefault(row["block"], []).append(row)
    return dict(sorted(found.items()))


def _agreement(rows: list[dict[str, Any]]) -> float | None:
    voted = [row for row in rows if row.get("agreement") is not None]
    numel = sum(row["numel"] for row in voted)
    return sum(row["agreement"] * row["numel"] for row in voted) / numel if voted else None


def _blocks(summary: Summary) -> Table | None:
    if not summary.tensors:
        return None
    rows = []
    for block, tensors in _by_block(summary).items():
        numel = sum(row["numel"] for row in tensors)
        pruned = sum(row["pruned"] for row in tensors)
        target = sum(row["target"] * row["numel"] for row in tensors) / numel
        clients = len(set[str]().union(*(row["clients"] for row in tensors)))
        rows.append([block, len(tensors), numel, pruned, target, pruned / numel, _agreement(tensors), clients])
    whole, percent = "{:,}".format, "{:.2%}".format
    columns = [
        Column("block"),
        Column("matrices", whole),
        Column("weights", whole),
        Column("zeros", whole),
        Column("target", percent),
        Column("achieved", percent),
        Column("agreement", percent),
        Column("clients", whole),
    ]
    return Table("blocks", "Sparsity of each block, and how far its clients agreed", columns, rows)


def _block_chart(summary: Summary) -> Chart | None:
    table = _blocks(summary)
    if table is None:
        return None
    scale = Scale(0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0])
    rows = []
    for block, _, _, _, target, achieved, agreement, clients in table.rows:
        marks = [
            charts.grid(scale),
            charts.bar(scale, achieved, "quiet", f"block {block}: {achieved:.2%} of the weights are zero"),
            charts.tick(scale, target, "target", f"block {block}: target {target:.2%}"),
        ]
        if agreement is not None:
            says = f"block {block}: {plural(clients, 'client')} agreed on {agreement:.2%} of the weights"
            marks.append(charts.dot(scale, agreement, "federated", says))
        rows.append(Row(f"block {block}", Markup("").join(marks), f"{achieved:.1%}"))
    legend = [("quiet", "zeros"), ("target", "target")]
    alt = f"Sparsity of {plural(len(rows), 'block')}: {', '.join(f'{row.label} {row.value}' for row in rows[:LONG])}."
    agreements = [row[6] for row in table.rows if row[6] is not None]
    if agreements:
        legend.append(("federated", "agreement of the clients"))
        alt += f" Clients agreed on {min(agreements):.1%} to {max(agreements):.1%} of the weights."
    return Chart("bars", alt, rows, charts.tick_labels(scale, [f"{value:.0%}" for value in scale.ticks]), legend)


def _agreement_map(summary: Summary) -> Chart | None:
    """Agreement of each linear (rows) in each block (columns)."""
    voted = {(row["block"], _linear(row)): row["agreement"] for row in summary.tensors if row.get("agreement") is not None}
    if not voted:
        return None
    blocks = sorted({block for block, _ in voted})
    low, high = min(voted.values()), max(voted.values())
    linears = list(dict.fromkeys(linear for _, linear in voted))
    rows = []
    for linear in linears:
        found = {
            column: (
                0.15 + 0.85 * ((voted[block, linear] - low) / (high - low or 1)),
                f"block {block}, {linear}: {voted[block, linear]:.2%}",
            )
            for column, block in enumerate(blocks)
            if (block, linear) in voted
        }
        of = [voted[block, linear] for block in blocks if (block, linear) in voted]
        rows.append(Row(linear, charts.cells(len(blocks), found), f"{sum(of) / len(of):.1%}"))
    alt = "Mean agreement over the blocks: " + ", ".join(f"{row.label} {row.value}" for row in rows) + "."
    return Chart("heat", alt, rows, charts.column_labels([str(block) for block in blocks]))


def _agreement_says(summary: Summary) -> str:
    voted = [row["agreement"] for row in summary.tensors if row.get("agreement") is not None]
    if not voted:
        return ""
    return (
        f"Agreement by matrix (rows) and block (columns), from {min(voted):.1%} (faintest) to {max(voted):.1%} (strongest); "
        "the number is the mean."
    )


def _linear(row: dict[str, Any]) -> str:
    """The linear's name without its block: "self_attn.q_proj" of "model.layers.0.self_attn.q_proj.weight"."""
    name: str = row["name"].removesuffix(".weight")
    return name.rpartition(f".{row['block']}.")[2]


def _tensors(summary: Summary) -> Table | None:
    if not summary.tensors:
        return None
    whole, percent = "{:,}".format, "{:.2%}".format
    columns = [
        Column("matrix"),
        Column("weights", whole),
        Column("zeros", whole),
        Column("target", percent),
        Column("achieved", percent),
        Column("agreement", percent),
        Column("clients", whole),
        Column("SHA-256"),
    ]
    rows = [
        [r["name"], r["numel"], r["pruned"], r["target"], r["sparsity"], r.get("agreement"), len(r["clients"]), r["sha256"]]
        for r in summary.tensors
    ]
    return Table("matrices", "Every pruned matrix, as pruning.json tells it", columns, rows)


class _Stage:
    """Who did what in a stage of pruning."""

    def __init__(self, summary: Summary, plan: dict[str, Any]):
        self.number: int = plan["stage"]
        self.rounds = num_rounds(plan)
        self.sums: bool = summary.job["stages"][self.number].get("aggregation") == "pooled"
        self._history = [row for row in summary.history if row["stage"] == self.number]
        self.num_blocks: int = plan["num_blocks"]
        self.clients = sorted(plan["clients"])
        self.unanswered = summary.unanswered(plan)
        self._by_round: list[dict[str, list[int]]] = [{client: [] for client in self.clients} for _ in range(self.rounds)]
        for (stage, round_, block), clients in sorted(summary.contributors.items()):
            if stage == self.number:
                for client in clients:
                    self._by_round[round_].setdefault(client, []).append(block)
        self.everybody_everything = all(
            len(blocks) == self.num_blocks for by_client in self._by_round for blocks in by_client.values()
        )
        self._plan = plan
        self._sent: dict[str, int] = dict.fromkeys(self.clients, 0)
        for row in summary.traffic:
            if (row.stage, row.direction, row.kind) == (self.number, "up", plan.get("ask", plan["kind"])):
                self._sent[row.client] = self._sent.get(row.client, 0) + row.bytes

    @property
    def table(self) -> Table:
        columns = [
            Column("client"),
            Column("blocks" if self.rounds == 1 else "blocks, all rounds", "{:,}".format),
            Column("weight in the sum", "{:.3g}".format),
            Column("windows", "{:,}".format),
            Column("own target", "{:.0%}".format),
            Column("upload planned", size),
            Column("upload", size),
            Column("memory planned", size),
        ]
        rows = []
        for client in self.clients:
            share = self._plan["clients"][client]
            blocks = sum(len(by_client.get(client, ())) for by_client in self._by_round)
            wanted = [share.get(key) for key in ("weight", "samples", "sparsity", "upload")]
            rows.append([client, blocks, *wanted, self._sent[client], share.get("memory")])
        caption = f"Who did what in stage {self.number}"
        return Table(f"stage-{self.number}-clients", caption, columns, rows)

    @property
    def rounds_table(self) -> Table | None:
        """Zeros and agreement of every round; None where there is one."""
        rounds = sorted({row["round"] for row in self._history})
        if len(rounds) < 2:
            return None
        rows = []
        for round_ in rounds:
            of = [row for row in self._history if row["round"] == round_]
            clients = len(set[str]().union(*(row["clients"] for row in of)))
            pruned, numel = (sum(row[key] for row in of) for key in ("pruned", "numel"))
            rows.append([f"round {round_}", len(of), clients, pruned, pruned / numel, _agreement(of)])
        whole, percent = "{:,}".format, "{:.2%}".format
        columns = [Column("round"), Column("blocks", whole), Column("clients", whole), Column("zeros", whole)]
        columns += [Column("achieved", percent), Column("agreement", percent)]
        return Table(f"stage-{self.number}-rounds", f"Rounds of stage {self.number}", columns, rows)

    @property
    def by_round(self) -> Table:
        """Every client's blocks in every round: only as CSV."""
        rows = [
            [client, *(";".join(map(str, by_client.get(client, ()))) for by_client in self._by_round)]
            for client in self.clients
        ]
        columns = [Column("client"), *(Column(f"round {round_}") for round_ in range(self.rounds))]
        return Table(f"stage-{self.number}-blocks", "", columns, rows)

    @property
    def map(self) -> Chart:
        """Client × block: in how many rounds."""
        rows = []
        for client in self.clients:
            found: dict[int, tuple[float, str]] = {}
            for block in range(self.num_blocks):
                rounds = [round_ for round_, by_client in enumerate(self._by_round) if block in by_client.get(client, ())]
                if rounds:
                    says = f"{_short(client)}, block {block}"
                    says += f": {plural(len(rounds), 'round')} ({ranges(rounds)})" if self.rounds > 1 else ""
                    found[block] = (0.15 + 0.85 * len(rounds) / self.rounds, says)
            number = sum(len(by_client.get(client, ())) for by_client in self._by_round)
            rows.append(Row(client, charts.cells(self.num_blocks, found), f"{number:,}"))
        alt = f"Blocks (columns, 0 to {self.num_blocks - 1}) that each client (rows) pruned; the table below counts them."
        return Chart("heat", alt, rows, charts.column_labels([str(block) for block in range(self.num_blocks)]))

    @property
    def small_maps(self) -> list[tuple[str, str]]:
        """For each round: (what it shows, its path); rows and columns as in ``map``. None where there is only one round."""
        if self.rounds == 1:
            return []
        return [
            (f"round {round_}", charts.runs([by_client.get(client, ()) for client in self.clients]))
            for round_, by_client in enumerate(self._by_round)
        ]


def _bytes_chart(summary: Summary) -> Chart | None:
    up, down = summary.uplink, summary.downlink
    if not any(up.values()):
        return None
    dense = summary.dense_bytes
    unit = 1e9 if max(dense, *up.values(), *down.values()) >= 1e9 else 1e6
    scale = Scale.over(value / unit for value in (dense, *up.values(), *down.values()))
    rows = []
    for client in summary.clients:
        marks = [
            charts.grid(scale),
            charts.bar(scale, up[client] / unit, "strong", f"{client} sent {up[client]:,} bytes"),
            charts.tick(scale, down[client] / unit, "received", f"{client} received {down[client]:,} bytes"),
        ]
        if dense:
            marks.append(charts.tick(scale, dense / unit, "target", f"dense: {dense:,} bytes"))
        rows.append(Row(client, Markup("").join(marks), size(up[client])))
    legend = [("strong", "sent"), ("received", "received")]
    if dense:
        legend.append(("target", "dense weights, each way"))
    most = max(up, key=lambda client: up[client])
    alt = f"Bytes sent by each of {plural(len(rows), 'client')}: {size(min(up.values()))} to {size(up[most])} ({most}); "
    alt += f"dense weights would be {size(dense)}." if dense else "see the table."
    name = "GB" if unit == 1e9 else "MB"
    return Chart("bars", alt, rows, charts.tick_labels(scale, [f"{value:g} {name}" for value in scale.ticks]), legend)


def _bytes_map(summary: Summary) -> Chart | None:
    """Client × round: bytes sent."""
    sent = summary.sent_by_round("up")
    most = max((value for by_client in sent.values() for value in by_client.values()), default=0)
    if len(sent) < 2 or not most:
        return None
    rows, total = [], summary.uplink
    for client in summary.clients:
        found = {
            column: (
                0.1 + 0.9 * by_client[client] / most,
                f"{_short(client)}, {_round(summary, key)}: {by_client[client]:,} bytes",
            )
            for column, (key, by_client) in enumerate(sorted(sent.items()))
            if by_client.get(client)
        }
        rows.append(Row(client, charts.cells(len(sent), found), size(total[client])))
    alt = f"Bytes that each client (rows) sent in each round (columns), at most {size(most)} in one."
    many_stages = len({stage for stage, _ in sent}) > 1
    labels = [f"{stage}/{round_}" if many_stages else str(round_) for stage, round_ in sorted(sent)]
    return Chart("heat", alt, rows, charts.column_labels(labels))


def _short(name: str) -> str:
    """A name that is said thousands of times."""
    return name if len(name) <= 24 else f"{name[:23]}…"


def _round(summary: Summary, key: tuple[int, int]) -> str:
    return f"stage {key[0]}, round {key[1]}" if len(summary.job["stages"]) > 1 else f"round {key[1]}"


def _bytes_by_client(summary: Summary) -> Table | None:
    if not summary.traffic:
        return None
    up, down = summary.uplink, summary.downlink
    around_up, around_down = summary.sent("up", around=True), summary.sent("down", around=True)
    around = {client: around_up[client] + around_down[client] for client in summary.clients}
    columns = [Column("client"), Column("sent", size), Column("received", size)]
    columns += [Column("dense, each way", size), Column("sent against dense", "{:.3f}".format)] if summary.dense_bytes else []
    columns += [Column("cards and measurement", size)]

    def row(name: str, up: int, down: int, dense: int, around: int) -> list[Any]:
        return [name, up, down, *([dense, up / dense] if dense else []), around]

    return Table(
        "bytes-by-client",
        "Bytes of each client, counted as they were sent",
        columns,
        [row(c, up[c], down[c], summary.dense_bytes, around[c]) for c in summary.clients],
        [row("all", sum(up.values()), sum(down.values()), summary.dense_bytes * len(summary.clients), sum(around.values()))],
    )


def _bytes_by_round(summary: Summary) -> Table | None:
    up, down = summary.sent_by_round("up"), summary.sent_by_round("down")
    keys = sorted(up.keys() | down.keys())
    if len(keys) < 2:
        return None
    dense = summary.dense_round_bytes * len(summary.clients)
    columns = [Column("round"), Column("clients that sent", "{:,}".format), Column("sent", size), Column("received", size)]
    columns += [Column("dense, each way", size)] if dense else []
    rows = []
    for key in keys:
        sent = up.get(key, {})
        values = [len(sent), sum(sent.values()), sum(down.get(key, {}).values())]
        rows.append([_round(summary, key), *values, *([dense] if dense else [])])
    return Table("bytes-by-round", "Bytes of all clients in each round", columns, rows)


def _narrowed(summary: Summary) -> Table | None:
    if not summary.narrowing:
        return None
    found, whole = summary.narrowing, "{:,}".format
    before, after, queries = found["before"], found["after"], found["queries"]
    rows = [
        ["MLP channels of a block", before["channels"], after["channels"]],
        ["heads of a block", queries * before["heads"], queries * after["heads"]],
        ["key-value heads of a block", before["heads"], after["heads"]],
        ["weights of the model", *found["parameters"]],
        ["bytes of the model", *found["bytes"]],
    ]
    columns = [Column(""), Column("before", whole), Column("after", whole), Column("left", "{:.3f}".format)]
    return Table("width", "Every block is cut alike", columns, [[*row, _ratio(row[2], row[1])] for row in rows])


def _model(summary: Summary) -> Table:
    zeros = sum(row["pruned"] for row in summary.tensors)
    rows: list[list[Any]] = [["plain safetensors (model/)", summary.model_bytes, 1.0]]
    if summary.packed_bytes is not None:
        rows.append(["packed (packed/)", summary.packed_bytes, _ratio(summary.packed_bytes, summary.model_bytes)])
    caption = f"Size on disk: {summary.parameters:,} weights"
    caption += f", {zeros:,} of them pruned to zero" if summary.tensors else ""
    return Table("size", caption, [Column("form"), Column("bytes", "{:,}".format), Column("of plain", "{:.3f}".format)], rows)


def _exports(summary: Summary) -> Table | None:
    """Every form that was exported into the run folder: bytes, and perplexity after it was reloaded."""
    if not summary.exports:
        return None
    columns = [Column("form"), Column("bytes", size), Column("of the model", "{:.3f}".format), Column("texts", "{:,}".format)]
    columns += [Column("perplexity", "{:.2f}".format), Column("against the model", change)]
    rows = [
        [
            one["form"],
            one["bytes"],
            one["bytes"] / one["of_model"],
            len(one["perplexity"]),
            mean_perplexity(one),
            mean_ratio(one),
        ]
        for one in summary.exports
    ]
    return Table("exports", "Exports, reloaded and measured", columns, rows)


def _measures(summary: Summary) -> Table | None:
    """What was measured of the model besides perplexity, with intervals where there are some."""
    stages = [None, *range(len(summary.job["stages"]))]
    ends = (".low", ".high")

    def of(stage: int | None, name: str) -> Spread | None:
        return _spread(name, lambda one: summary.rounds_measured.get((stage, None, None, one)))

    names = [name for _, round_, client, name in summary.rounds_measured
             if "/" in name and round_ is None and client is None and not name.partition("/")[0].endswith(ends)]  # fmt: skip
    rows: list[list[Any]] = []
    pooled = any(name in summary.centralized_measured for name in names)
    used = [stage for stage in stages if stage in (None, summary.last) or any(of(stage, name) for name in names)]
    for name in dict.fromkeys(names):
        measure, _, text = name.partition("/")
        values = [of(stage, name) for stage in used]
        row = [f"{text}: {measure}", *values]
        row += [_spread(name, summary.centralized_measured.get)] if pooled else []
        before, after = values[0], values[-1]
        difference = ratio = None
        if before and after:
            ratio = _ratio(after.value, before.value)
            old, new = (summary.examples.get((stage, None), {}) for stage in (None, summary.last))
            interval = difference_interval(new, old, name)
            if interval:
                low, high = interval
                signed = [f"{value:+.3f}".replace("-", "−") for value in (after.value - before.value, low, high)]
                around = f"{signed[1]} to {signed[2]}" + (", not clear" if unclear(interval, 0.0) else "")
                difference = Spread(after.value - before.value, low, high, signed[0], around)
        rows.append([*row, ratio, difference])
    titles = {None: "before", summary.last: "after"}
    columns = [Column("what"), *(Column(titles.get(stage, f"after stage {stage}"), spread=True) for stage in used)]
    columns += [Column("centralized", spread=True)] if pooled else []
    columns.append(Column("after against before", change))
    if any(row[-1] for row in rows):
        columns.append(Column("difference", spread=True))
    rows = [row[: len(columns)] for row in rows]
    return Table("measures", "Measured before and after", columns, rows) if rows else None


def _spread(name: str, take: Callable[[str], float | None]) -> Spread | None:
    """A measurement and its interval, in its unit."""
    measure, _, text = name.partition("/")
    value, low, high = take(name), take(f"{measure}.low/{text}"), take(f"{measure}.high/{text}")
    if value is None:
        return None
    if measure in ("disk", "memory"):
        return Spread(value, low, high, size(value))
    digits, unit = (1, " tokens/s") if measure in ("prefill", "decode") else (3, "")
    around = f"{low:,.{digits}f} to {high:,.{digits}f}" if low is not None and high is not None else ""
    return Spread(value, low, high, f"{value:,.{digits}f}{unit}", around)


def _samples(summary: Summary) -> Table:
    """What the model writes: only as CSV."""
    rows = [[sample["prompt"], sample["before"], sample["after"]] for sample in summary.samples]
    return Table("samples", "", [Column("prompt"), Column("before"), Column("after")], rows)


def _ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def _without_folders(value: Any, key: str = "") -> Any:
    """A copy of the job whose paths are file names: the page is made to be passed on, and folders tell of their owner."""
    if isinstance(value, dict):
        return {name: _without_folders(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part, key) for part in value]
    return file_name(value) if key in PRIVATE and isinstance(value, str) else copy.copy(value)
