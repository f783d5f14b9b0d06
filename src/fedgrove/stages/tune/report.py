"""What the report, the terminal and the model card say about a stage that fine-tunes: from its plan and the metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedgrove.quantities import mebibytes
from fedgrove.report import charts
from fedgrove.report.charts import Chart, Row, Scale
from fedgrove.report.newcomers import NEW, Newcomers
from fedgrove.report.personal import Personal, Words, without_comparison
from fedgrove.report.sections import Bullets, Figure, Paragraph, Part, Picture, Section, Sheet, numbered
from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import PERPLEXITY, Outcome, Stage, Summary
from fedgrove.report.terminal import client_table, fill, megabytes, seconds
from fedgrove.report.words import listed, plural, size
from fedgrove.stages.tune.objective import GAINED, PREDICTED
from fedgrove.stages.tune.speeds import CORRECTED

DID = "tuned"
DOING = "tuning"
POOL = "pool/pool.json"
FILES: tuple[str, ...] = (POOL, NEW)
FOLDERS: tuple[str, ...] = ("adapter", "pool")
TAGS: tuple[str, ...] = ()
CARD = ""
MOST_COLUMNS = 8  # for more clients the table shows the lowest, mean and highest rank instead of one column per client
TRAINED = {  # by disclosure
    "FACTORS": "low-rank adapters",
    "CHANGES": "whole matrices",
    "SCALES": "scales of channels",
    "LOSS_DIFFERENCES": "steps along random directions",
}
MOST_ROWS = 20  # of the chart of loss against bytes
IMPORTANCE = "importance/"
SHOWN = "beside the others, the round before did not take it as long as the plan had promised."
GAINS = {PREDICTED: "gain predicted, nats a token", GAINED: "gain, nats a token"}
_EXPERT = re.compile(r"experts\.\d+\.")
ADAPTER = Words("adapter", "an adapter", "own best", "After the same steps alone")


def describe(config: Mapping[str, Any]) -> str:
    """Such as "tune lora, planner fedpipe, aggregation flexlora"."""
    pool = config.get("pool")
    number = pool and ("as many as there are kinds" if pool["members"] == "auto" else pool["members"])
    of = f", a pool of {number} by {pool['gate']}" if pool else ""
    return f"tune {config.get('parametrization')}, planner {config.get('planner')}, aggregation {config.get('aggregation')}{of}"


def recipe(config: Mapping[str, Any]) -> str:
    """Rounds and steps."""
    return f"{plural(config['rounds'], 'round')} of {plural(config['steps'], 'step')}; merged into the weights"


def limits(config: Mapping[str, Any]) -> str:
    return ""


def plan_table(plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
    """Each client's capabilities and its assignment in a round."""
    deadline = f", deadline {plan['deadline']:.3g} s" if plan["deadline"] else ""
    how = f"{plan['parametrization']}, planner {plan['planner']}{deadline}"
    title = f"stage {plan['stage']}: tune {how}; each client, in a round"
    table = client_table(title, "client", "has", "bits", "batch", "steps", "ranks", "memory", "upload", "time")
    for client, assignment in plan["clients"].items():
        capabilities = plan["capabilities"][client]
        has = [mebibytes(capabilities["memory"])] if capabilities["memory"] else []
        has += [f"speed {capabilities['speed']:g}"]
        has += [f"{capabilities['uplink'] / 1e6:,.0f} Mbit up"] if capabilities["uplink"] else []
        at_once = f" ({assignment['micro']} at once)" if assignment["micro"] < assignment["batch"] else ""
        fill(
            table, client, ", ".join(has), str(assignment["bits"]), f"{assignment['batch']}{at_once}",
            str(assignment.get("steps", "")),
            _ranks(plan, assignment), mebibytes(assignment["memory"]),
            _sent(assignment["upload"]), seconds(assignment["seconds"], 1),
        )  # fmt: skip
    left_out = [Text(f"{client} is left out: {why}") for client, why in sorted(plan["left_out"].items())]
    total = Text(f"All rounds together take {plan['total']:,.1f} s on the clients' machines, modeled from their capabilities.")
    return Group(table, total, *left_out)


def result_tables(summary: Summary, stage: Stage) -> list[RenderableType]:
    """The plan in force, which may differ from the plan before the run, and what adapters of the owners' own are worth."""
    if not stage.plan:
        return []
    personal, new = personal_of(summary, stage), Newcomers.of(summary, stage)
    says = [of.lines() for of in (personal, new) if of is not None]
    without = without_comparison(stage, personal.losses if personal is not None else ())
    says += [without] if without else []
    return [plan_table(stage.plan, stage.config), *(Text("\n".join(lines)) for lines in says)]


def personal_of(summary: Summary, stage: Stage) -> Personal | None:
    """What adapters of one's own are worth; None if no client compared two."""
    return Personal.of(summary, stage, ADAPTER, {client: stage.plan["clients"][client]["tokens"] for client in stage.clients})


def outcome(stage: Stage, files: Mapping[str, Any]) -> Outcome:
    """What was trained, and in how many rounds."""
    rounds = f" in {plural(stage.config['rounds'], 'round')}" if "rounds" in stage.config else ""
    return Outcome(f"{trained(stage.plan)} were trained{rounds} and merged into it")


def figures(summary: Summary, stage: Stage) -> list[Figure]:
    return []


def sections(summary: Summary, stage: Stage) -> list[Section]:
    """Each client's capabilities and assignment, the importance of the matrices, and the losses."""
    return [Tuning(summary, stage).section(summary)] if stage.plan else []


def trained(plan: Mapping[str, Any]) -> str:
    """What the clients trained: "low-rank adapters"."""
    return listed([TRAINED[name] for name in plan.get("discloses", ()) if name in TRAINED]) or "changes"


def ranked(plan: Mapping[str, Any]) -> bool:
    """Whether the trained changes have ranks; if not, plans record rank 1."""
    return "FACTORS" in plan.get("discloses", ())


def _sent(num_bytes: int) -> str:
    """Bytes in a table of MB, unless that would be nothing."""
    return megabytes(num_bytes) if num_bytes >= 50_000 else size(num_bytes)


def _ranks(plan: Mapping[str, Any], assignment: Mapping[str, Any]) -> str:
    """{a: 8, b: 8, c: 2} of 4 linears -> "8 in 2, 2 in 1, none in 1"; of a mixture also "4 of 8 experts"."""
    linears, values = len(plan["importance"]), list(assignment["ranks"].values())
    if assignment.get("forwards"):
        return f"{assignment['forwards']:,} forwards in {len(values)}"
    if "LOSS_DIFFERENCES" in plan.get("discloses", ()):
        return f"exact slopes in {len(values)}"
    experts = [] if plan.get("experts") is None else [_held(plan, assignment)]
    if not ranked(plan):
        return ", ".join([f"{trained(plan)} in {len(values)}", *experts])
    parts = [f"{rank} in {values.count(rank)}" for rank in sorted(set(values), reverse=True)]
    none = [f"none in {linears - len(values)}"] if len(values) < linears else []
    return ", ".join([*parts, *none, *experts])


def _held(plan: Mapping[str, Any], assignment: Mapping[str, Any]) -> str:
    """How many experts of every block a client holds: "4 of 8 experts"."""
    return f"{assignment['experts']} of {plan['experts']} experts"


def _pool_says(pool: Mapping[str, Any]) -> str:
    """What the pool is, and what can be done with it."""
    fitted = pool.get("fitted_to")
    how = f" The gate was fitted in {plural(len(pool['likelihoods']), 'exchange')}, to {fitted}." if fitted else ""
    if pool["members"] == 1 and pool["pool"]["members"] == "auto":
        return (
            f"Gate {pool['pool']['gate']} tells no kinds of text apart that enough clients have (privacy.min_group): one "
            f"adapter was trained, as without a pool.{how}"
        )
    if "weights" in pool:
        return (
            "Every client has a member of the pool: the changes of all clients, each weighed by what it is worth to that "
            f"client (gate {pool['pool']['gate']}). The result is the mean of the members, weighted by the windows of each "
            "client. The members are in pool/."
        )
    return (
        f"The result is the mean of {plural(pool['members'], 'adapter')}, the members of a pool, weighted by the windows that "
        f"each was trained on (gate {pool['pool']['gate']}).{how} The members are in pool/; fedgrove adopt gives an owner a "
        "mixture of its own."
    )


def _pool_table(stage: Stage, pool: Mapping[str, Any]) -> Table:
    """How many windows of each client each member got, or how much of each client's change."""
    if "weights" in pool:
        columns = [Column("client"), *(Column(client, "{:.0%}".format) for client in pool["weights"])]
        rows = [[client, *weights] for client, weights in pool["weights"].items()]
        return Table(f"stage-{stage.number}-pool", "How much of what each client changed its member has", columns, rows)
    columns = [Column("client"), *(Column(f"member {member}", "{:,}".format) for member in range(pool["members"]))]
    rows = [[client, *windows] for client, windows in pool["clients"].items()] or [["all together", *pool["windows"]]]
    return Table(f"stage-{stage.number}-pool", "Windows of each client that each member is trained on", columns, rows)


class Tuning:
    """The part of the page about one stage that fine-tunes."""

    def __init__(self, summary: Summary, stage: Stage):
        self.stage = stage
        self._plan = stage.plan
        self._assignments: dict[str, dict[str, Any]] = stage.plan["clients"]
        self._measured = {key[1:]: value for key, value in summary.rounds_measured.items() if key[0] == stage.number}
        self._rounds = sorted({r for r, _, name in self._measured if r is not None and name in ("loss", "clock")})

    def section(self, summary: Summary) -> Section:
        """The stage's section of the page."""
        parts: list[Part] = [Paragraph(self._says())]
        if self._plan["left_out"]:
            parts.append(Bullets([f"{client} was left out: {why}" for client, why in sorted(self._plan["left_out"].items())]))
        slower = sorted((r, client, speed) for (r, client, name), speed in self._measured.items() if name == CORRECTED)
        if slower:
            parts.append(
                Bullets(
                    [f"{client}: from round {r} on its speed was taken as {speed:g}: {SHOWN}" for r, client, speed in slower]
                )
            )
        parts += [Sheet(self._capabilities()), Sheet(self._given())]
        if any(name.startswith(IMPORTANCE) for _, _, name in self._measured):
            caption = (
                "How important it is to tune each matrix (rows) of each block (columns), as a fraction of the total "
                "importance. The number at the end of a row is its sum. Hover for the ranks."
            )
            parts.append(Picture(self._importance_map(), caption))
        if ranked(self._plan):
            parts.append(Sheet(self._linears(), folded=True))
        if self._rounds:
            parts.append(Sheet(self._by_round()))
            chart = self._loss_by_bytes(summary)
            if chart:
                parts.append(Picture(chart, "Loss against the bytes that all clients sent and received up to a round."))
        pool = summary.files.get(POOL)
        if pool and pool["stage"] == self.stage.number:
            parts += [Paragraph(_pool_says(pool)), Sheet(_pool_table(self.stage, pool))]
        personal = personal_of(summary, self.stage)
        parts += map(Paragraph, without_comparison(self.stage, personal.losses if personal is not None else ()))
        for of in (personal, Newcomers.of(summary, self.stage)):
            if of is not None:
                parts += [*map(Paragraph, of.lines()), Sheet(of.table())]
        return Section(f"stage-{self.stage.number}", numbered(summary, self.stage, "Tuning"), parts)

    def _says(self) -> str:
        """What happened, in a sentence or two."""
        given = [
            {key: of[key] for key in ("bits", "batch", "steps", "ranks") if key in of} for of in self._assignments.values()
        ]
        alike = all(one == given[0] for one in given)
        who = "all with the same settings" if alike else "each with settings that its memory, speed and uplink allow"
        clients = plural(len(given), "client")
        says = f"{clients} trained {trained(self._plan)} for {plural(len(self._rounds), 'round')}, {who}."
        clock = self._of_round(self._rounds[-1], "clock") if self._rounds else None
        if clock is None:
            return says
        slowest = max(self.stage.clients, key=lambda client: self._assignments[client]["seconds"])
        return (
            f"{says} On machines with the capabilities that the clients report, this takes {clock:,.1f} s (modeled). "
            f"A round ends when the slowest client has responded; by the plan, this is {slowest}."
        )

    def _capabilities(self) -> Table:
        """The capabilities of every client."""
        columns = [
            Column("client"), Column("tokens", "{:,}".format), Column("memory", size), Column("speed", "{:g}".format),
            Column("uplink, Mbit/s", "{:g}".format), Column("devices", "{:g}".format),
        ]  # fmt: skip
        rows = []
        for client in self.stage.clients:
            assignment, capabilities = self._assignments[client], self._plan["capabilities"][client]
            uplink = capabilities["uplink"] / 1e6 if capabilities["uplink"] else None
            devices = assignment.get("devices", 1)
            rows.append([client, assignment["tokens"], capabilities["memory"], capabilities["speed"], uplink, devices])
        return Table(f"stage-{self.stage.number}-capabilities", "What each client has", columns, rows)

    def _given(self) -> Table:
        """Every client's assignment, the memory, upload and time planned for it, and its losses."""
        mixture = [] if self._plan.get("experts") is None else [Column("holds")]
        columns = [
            Column("client"), Column("bits", "{:g}".format), Column("batch", "{:g}".format), Column("at once", "{:g}".format),
            Column("steps", "{:g}".format),
            Column("matrices", "{:g}".format), *mixture, Column("rank, mean", "{:.1f}".format), Column("memory planned", size),
            Column("upload a round", size), Column("time a round", "{:,.2f} s".format),
            Column("loss, first round", "{:.3f}".format), Column("loss, last round", "{:.3f}".format),
        ]  # fmt: skip
        rows = []
        for client in self.stage.clients:
            assignment = self._assignments[client]
            ranks: dict[str, int] = assignment["ranks"]
            rank = sum(ranks.values()) / len(ranks) if ranks and ranked(self._plan) else None
            losses = [self._measured.get((r, client, "loss")) for r in self._rounds]
            known = [loss for loss in losses if loss is not None]
            given = [*(assignment.get(key) for key in ("bits", "batch", "micro", "steps")), len(ranks), rank]
            planned = [assignment[key] for key in ("memory", "upload", "seconds")]
            given[5:5] = [_held(self._plan, assignment) for _ in mixture]
            rows.append([client, *given, *planned, known[0] if known else None, known[-1] if known else None])
        return Table(f"stage-{self.stage.number}-given", "What each client was given", columns, rows)

    def _importance_map(self) -> Chart:
        """Importance of each linear (rows) in each block (columns)."""
        importance: dict[str, float] = self._plan["importance"]
        cells_of: dict[str, dict[int, list[str]]] = {}  # by kind of matrix and block; of experts, all of a block together
        for name in importance:
            block, linear = _place(name)
            cells_of.setdefault(_EXPERT.sub("experts.", linear), {}).setdefault(block, []).append(name)
        sums = {row: {b: sum(importance[name] for name in of) for b, of in by.items()} for row, by in cells_of.items()}
        blocks = sorted({block for by in cells_of.values() for block in by})
        highest = max(value for by in sums.values() for value in by.values()) or 1.0
        rows = []
        for row, by_block in cells_of.items():
            cells = {
                column: (
                    0.05 + 0.95 * sums[row][block] / highest,
                    f"block {block}, {row}: {sums[row][block]:.2%}, {self._ranks_say(by_block[block])}",
                )
                for column, block in enumerate(blocks)
                if block in by_block
            }
            rows.append(Row(row, charts.cells(len(blocks), cells), f"{sum(sums[row].values()):.1%}"))
        alt = "Importance by kind of matrix, over all blocks: " + ", ".join(f"{row.label} {row.value}" for row in rows) + "."
        return Chart("heat", alt, rows, charts.column_labels([str(block) for block in blocks]))

    def _linears(self) -> Table:
        """Every linear: its importance and the clients' ranks."""
        clients = self.stage.clients
        few = len(clients) <= MOST_COLUMNS
        titles = [f"rank, {client}" for client in clients] if few else ["rank, lowest", "rank, mean", "rank, highest"]
        rows = []
        for name, importance in self._plan["importance"].items():
            ranks = self._ranks_of(name)
            rows.append([name, importance, *(ranks if few else (min(ranks), sum(ranks) / len(ranks), max(ranks)))])
        columns = [Column("matrix"), Column("importance", "{:.2%}".format), *(Column(title, "{:g}".format) for title in titles)]
        caption = "Importance of every matrix, and its ranks"
        return Table(f"stage-{self.stage.number}-importance", caption, columns, rows)

    def _by_round(self) -> Table:
        """Every round: mean loss of the clients, modeled time, held-out perplexity if it was measured, and what it gained."""
        texts = sorted({name for r, c, name in self._measured if r is not None and c is None and name.startswith(PERPLEXITY)})
        columns = [
            Column("round"),
            Column("loss of the clients, mean", "{:.3f}".format),
            Column("modeled seconds", "{:,.2f}".format),
        ]
        columns += [Column(f"perplexity, {text.removeprefix(PERPLEXITY)}", "{:.1f}".format) for text in texts]
        gains = [name for name in (PREDICTED, GAINED) if any(self._of_round(r, name) is not None for r in self._rounds)]
        columns += [Column(GAINS[name], "{:.4f}".format) for name in gains]
        rows = [[r, *(self._of_round(r, name) for name in ("loss", "clock", *texts, *gains))] for r in self._rounds]
        return Table(f"stage-{self.stage.number}-rounds", "Round by round", columns, rows)

    def _loss_by_bytes(self, summary: Summary) -> Chart | None:
        """A dot for each round: how far the loss has fallen since the first, beside the bytes so far; None without losses."""
        texts = sorted({name for _, c, name in self._measured if c is None and name.startswith(PERPLEXITY)})
        of = next((name for name in ("loss", *texts) if self._of_round(self._rounds[-1], name) is not None), None)
        known = [(r, value) for r in self._rounds if of and (value := self._of_round(r, of)) is not None]
        if len(known) < 2:
            return None
        sent: dict[int, int] = {}
        for direction in ("up", "down"):
            for (stage, r), by_client in summary.sent_by_round(direction).items():
                if stage == self.stage.number:
                    sent[r] = sent.get(r, 0) + sum(by_client.values())
        shown = known[:: -(-len(known) // MOST_ROWS)]
        shown += [known[-1]] if shown[-1] != known[-1] else []
        changes = {r: 100 * (value / known[0][1] - 1) for r, value in shown}
        scale = Scale.over(changes.values())
        rows = []
        for r, value in shown:
            so_far = size(sum(count for earlier, count in sent.items() if earlier <= r))
            dot = charts.dot(scale, changes[r], "federated", f"round {r}: {value:.3f} after {so_far}")
            rows.append(Row(so_far, charts.grid(scale) + dot, f"{value:.3f}"))
        what = "Loss of the clients" if of == "loss" else f"Perplexity, {str(of).removeprefix(PERPLEXITY)}"
        alt = f"{what} by bytes so far: {rows[0].value} after {rows[0].label}, {rows[-1].value} after {rows[-1].label}."
        labels = [f"{value:+g}%".replace("-", "−") if value else "first round" for value in scale.ticks]
        return Chart("dots", alt, rows, charts.tick_labels(scale, labels), [("federated", what)])

    def _of_round(self, round_: int, name: str) -> float | None:
        return self._measured.get((round_, None, name))

    def _ranks_of(self, linear: str) -> list[int]:
        return [self._assignments[client]["ranks"].get(linear, 0) for client in self.stage.clients]

    def _ranks_say(self, linears: list[str]) -> str:
        ranks = [rank for linear in linears for rank in self._ranks_of(linear)]
        if not any(ranks):
            return "not tuned"
        return f"rank {min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"rank {max(ranks)}"


def _place(linear: str) -> tuple[int, str]:
    """(3, "mlp.up_proj") of "model.layers.3.mlp.up_proj"."""
    parts = linear.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return int(parts[at]), ".".join(parts[at + 1 :])
