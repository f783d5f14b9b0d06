"""What the report, the terminal and the model card say about a stage that prunes: its plan, ``pruning.json``, the ledger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.text import Text

from fedgrove.quantities import mebibytes
from fedgrove.report import charts
from fedgrove.report.charts import Chart, Row, Scale
from fedgrove.report.personal import Personal, Words
from fedgrove.report.sections import Download, Figure, Paragraph, Part, Picture, Section, Sheet, SmallMaps, numbered
from fedgrove.report.sheet import LONG, Column, Table
from fedgrove.report.summary import Outcome, Stage, Summary
from fedgrove.report.terminal import client_table, fill, megabytes, seconds
from fedgrove.report.words import plural, ranges, shortened, size

DID = "pruned"
DOING = "pruning"
FILES = ("pruning.json",)
FOLDERS: tuple[str, ...] = ()
TAGS = ("pruned", "sparse")
CARD = "Pruned weights are exact zeros in dense tensors, so any program that loads the base model also loads this one."
BLOCK, STATISTICS = "prune/block", "prune/statistics"  # kinds of request whose responses are a client's contribution to a block
WHOLE, PERCENT = "{:,}".format, "{:.2%}".format

Record = dict[str, Any]
MODEL = Words("model", "a model", "own", "Pruned alone")
EVENLY = "even"  # the default allocation, which descriptions do not mention


def describe(config: Mapping[str, Any]) -> str:
    """Such as "prune with sparsegpt to 50%, aggregation fedspallm"."""
    target = config.get("pattern") or f"{100 * config.get('sparsity', 0):g}%"
    uneven = f" ({config['allocation']})" if config.get("allocation", EVENLY) != EVENLY else ""
    mended = f", mended with {config['mend']}" if config.get("mend") else ""
    return f"prune with {config.get('pruner')} to {target}{uneven}, aggregation {config.get('aggregation')}{mended}"


def recipe(config: Mapping[str, Any]) -> str:
    """How much text each client uses, and the number of rounds."""
    return f"{config['samples']} windows of {config['length']} tokens from each client; {plural(config['rounds'], 'round')}"


def limits(config: Mapping[str, Any]) -> str:
    """What clients did not send because of ``mixed`` and ``protect_first_block``."""
    mixed = "Clients sent products only of inputs that are no wider than the hidden states (mixed = true)."
    first = "Clients sent nothing about block 0 (protect_first_block = true)."
    return " ".join(says for says, key in ((mixed, "mixed"), (first, "protect_first_block")) if config.get(key))


def plan_table(plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
    """Blocks, windows and target of each client, and what they cost."""
    mended = f", mended with {config['mend']}" if config.get("mend") else ""
    title = f"stage {plan['stage']}: prune, {config['pruner']}, aggregation {config['aggregation']}{mended}"
    table = client_table(title, "client", "blocks", "windows", "target", "memory", "upload", "time")
    for client, assignment in plan["clients"].items():
        blocks = "; ".join(ranges(numbers) for numbers in assignment["blocks"])
        target = config.get("pattern") or f"{assignment['sparsity']:.0%}"
        held_out = f" + {assignment['held_out']} held out" if assignment.get("held_out") else ""
        windows = f"{assignment['samples']}{held_out}"
        fill(
            table, client, f"{blocks} of {plan['num_blocks']}", windows, target,
            mebibytes(assignment["memory"]), megabytes(assignment["upload"]), seconds(assignment["seconds"]),
        )  # fmt: skip
    if not plan.get("choices"):
        return Group(table)
    sizes = "; ".join(f"{choice}: {megabytes(number)}" for choice, number in plan["choices"].items())
    return Group(table, Text(f"Upload of a client, by pruner: {sizes}."))


def result_tables(summary: Summary, stage: Stage) -> list[RenderableType]:
    """What models of one's own are worth."""
    personal = personal_of(summary, stage)
    return [Text("\n".join(personal.lines()))] if personal else []


def personal_of(summary: Summary, stage: Stage) -> Personal | None:
    """What models of one's own are worth; None if no client told."""
    if not stage.plan:
        return None
    tokens = {client: stage.plan["clients"][client]["samples"] * stage.config["length"] for client in stage.clients}
    return Personal.of(summary, stage, MODEL, tokens)


def outcome(stage: Stage, files: Mapping[str, Any]) -> Outcome:
    """The zeros of the matrices, if this is the last stage that pruned; ``pruning.json`` describes only that one."""
    tensors = _records(files)
    numbers = sum(row["numel"] for row in tensors)
    if not tensors or stage.number != _told_stage(files):
        return Outcome(dense=numbers, rounds=num_rounds(stage.plan))
    zeros = sum(row["pruned"] for row in tensors)
    exact = all(row["pruned"] == math.floor(row["target"] * row["numel"] + 0.5) for row in tensors)
    targets = {row["target"] for row in tensors}
    wanted = "with targets that differ by matrix" if len(targets) > 1 else f"with a target of {targets.pop():.1%}"
    says = f"{zeros / max(1, numbers):.1%} of the weights in {plural(len(tensors), 'matrix')} are zero, "
    says += "in each exactly the target" if exact else wanted
    return Outcome(says, zeros, numbers, numbers, num_rounds(stage.plan))


def figures(summary: Summary, stage: Stage) -> list[Figure]:
    """The sparsity of the pruned matrices."""
    result = summary.outcomes[stage.number]
    if not result.weights:
        return []
    matrices = plural(len(_records(summary.files)), "matrix")
    return [Figure(f"{result.zeros / result.weights:.1%}", "of the weights are zero", f"in {matrices} pruned")]


def sections(summary: Summary, stage: Stage) -> list[Section]:
    """Sparsity and agreement, if this is the last stage that pruned; and who contributed what."""
    of_result = [_sparsity(summary)] if summary.outcomes[stage.number].weights else []
    return [*of_result, *([Contributions(summary, stage).section(summary)] if stage.plan else [])]


def num_rounds(plan: Mapping[str, Any]) -> int:
    """The number of rounds of a plan."""
    return max((len(assignment.get("blocks", ())) for assignment in plan.get("clients", {}).values()), default=0)


def contributors(summary: Summary, stage: Stage) -> dict[tuple[int, int], list[str]]:
    """The clients that contributed to a block, by (round, block).

    ``pruning.json`` records whose responses were used. For a round that it does not record, these are the clients to which the
    plan assigned the block.
    """
    clients: dict[tuple[int, int], list[str]] = {}
    for client in stage.clients:
        for round_, blocks in enumerate(stage.plan["clients"][client].get("blocks", ())):
            for block in blocks:
                clients.setdefault((round_, block), []).append(client)
    rows = _history(summary, stage.number)
    if stage.number == _told_stage(summary.files):
        rows = [*_records(summary.files), *rows]
    return clients | {(row["round"], row["block"]): sorted(row["clients"]) for row in rows}


def unanswered(summary: Summary, stage: Stage) -> dict[str, int]:
    """How many requests a client did not answer, by client; only those with any.

    After an interruption, requests for the current block are sent and answered again, so the number can be too low, but never
    too high.
    """
    answered: dict[str, int] = {}
    for row in summary.traffic:
        if (row.stage, row.direction) == (stage.number, "up") and row.kind in _requests(stage):
            answered[row.client] = answered.get(row.client, 0) + row.messages
    mended = stage.plan["num_blocks"] if stage.plan.get("mends_votes") else 0
    asked = {client: mended + sum(map(len, stage.plan["clients"][client].get("blocks", ()))) for client in stage.clients}
    missing = {client: number - answered.get(client, 0) for client, number in asked.items()}
    return {client: number for client, number in missing.items() if number > 0}


def _requests(stage: Stage) -> set[str]:
    """The kinds of request whose responses are a client's contributions to a block, as in the ledger."""
    if stage.plan["sums"]:
        return {STATISTICS}
    return {BLOCK, STATISTICS} if stage.plan.get("mends_votes") else {BLOCK}


def _records(files: Mapping[str, Any]) -> list[Record]:
    """The records of ``pruning.json``, one for each pruned matrix."""
    records: list[Record] = files.get("pruning.json", {}).get("tensors", [])
    return records


def _told_stage(files: Mapping[str, Any]) -> int:
    """The stage that the records describe."""
    stage: int = files.get("pruning.json", {}).get("stage", 0)
    return stage


def _history(summary: Summary, stage: int) -> list[Record]:
    """A record for each round and block of a stage."""
    rows: list[Record] = summary.files.get("pruning.json", {}).get("history", [])
    return [row for row in rows if row["stage"] == stage]


def _sparsity(summary: Summary) -> Section:
    tensors = _records(summary.files)
    voted = [row["agreement"] for row in tensors if row.get("agreement") is not None]
    says = "A zero weight can be stored in one bit. Clients agree on a weight if all of them keep it or all of them prune it. "
    says += (
        "The fewer clients prune a block, the more they agree by chance."
        if voted
        else "With this aggregation, clients send no masks, so their agreement is not known."
    )
    mended = [row for row in tensors if "restored" in row]
    if mended:
        restored, kept = sum(row["restored"] for row in mended), sum(row["numel"] - row["pruned"] for row in mended)
        says += f" Mending the masks swapped {restored / max(1, kept):.2%} of the weights that are kept."
    blocks = _blocks(tensors)
    parts: list[Part] = [Paragraph(says), Picture(_block_chart(blocks), "Zeros in each block of the model, and the target.")]
    if voted:
        caption = (
            f"Agreement by matrix (rows) and block (columns), from {min(voted):.1%} (faintest) to {max(voted):.1%} "
            "(strongest); the number is the mean over the blocks."
        )
        parts.append(Picture(_agreement_map(tensors), caption))
    parts += [Sheet(blocks), Sheet(_matrices(tensors), folded=True)]
    return Section("sparsity", "Sparsity and agreement", parts)


def _blocks(tensors: Iterable[Record]) -> Table:
    by_block: dict[int, list[Record]] = {}
    for row in tensors:
        by_block.setdefault(row["block"], []).append(row)
    rows = []
    for block, of in sorted(by_block.items()):
        numel = sum(row["numel"] for row in of)
        pruned = sum(row["pruned"] for row in of)
        target = sum(row["target"] * row["numel"] for row in of) / numel
        clients = len(set[str]().union(*(row["clients"] for row in of)))
        rows.append([block, len(of), numel, pruned, target, pruned / numel, agreement(of), clients])
    columns = [
        Column("block"), Column("matrices", WHOLE), Column("weights", WHOLE), Column("zeros", WHOLE), Column("target", PERCENT),
        Column("achieved", PERCENT), Column("agreement", PERCENT), Column("clients", WHOLE),
    ]  # fmt: skip
    return Table("blocks", "Sparsity of each block, and how far its clients agreed", columns, rows)


def agreement(rows: Iterable[Record]) -> float | None:
    """The mean agreement over all weights with masks from clients; None if there are none."""
    voted = [row for row in rows if row.get("agreement") is not None]
    numel = sum(row["numel"] for row in voted)
    return sum(row["agreement"] * row["numel"] for row in voted) / numel if voted else None


def _block_chart(blocks: Table) -> Chart:
    scale = Scale(0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0])
    rows = []
    for block, _, _, _, target, achieved, agreed, clients in blocks.rows:
        marks = [
            charts.grid(scale),
            charts.bar(scale, achieved, "quiet", f"block {block}: {achieved:.2%} of the weights are zero"),
            charts.tick(scale, target, "target", f"block {block}: target {target:.2%}"),
        ]
        if agreed is not None:
            says = f"block {block}: {plural(clients, 'client')} agreed on {agreed:.2%} of the weights"
            marks.append(charts.dot(scale, agreed, "federated", says))
        rows.append(Row(f"block {block}", Markup("").join(marks), f"{achieved:.1%}"))
    legend = [("quiet", "zeros"), ("target", "target")]
    alt = f"Sparsity of {plural(len(rows), 'block')}: {', '.join(f'{row.label} {row.value}' for row in rows[:LONG])}."
    agreements = [row[6] for row in blocks.rows if row[6] is not None]
    if agreements:
        legend.append(("federated", "agreement of the clients"))
        alt += f" Clients agreed on {min(agreements):.1%} to {max(agreements):.1%} of the weights."
    return Chart("bars", alt, rows, charts.tick_labels(scale, [f"{value:.0%}" for value in scale.ticks]), legend)


def _agreement_map(tensors: Iterable[Record]) -> Chart:
    """Agreement of each linear (rows) in each block (columns)."""
    voted = {(row["block"], _linear(row)): row["agreement"] for row in tensors if row.get("agreement") is not None}
    blocks = sorted({block for block, _ in voted})
    low, high = min(voted.values()), max(voted.values())
    rows = []
    for linear in dict.fromkeys(linear for _, linear in voted):
        cells = {
            column: (
                0.15 + 0.85 * ((voted[block, linear] - low) / (high - low or 1)),
                f"block {block}, {linear}: {voted[block, linear]:.2%}",
            )
            for column, block in enumerate(blocks)
            if (block, linear) in voted
        }
        of = [voted[block, linear] for block in blocks if (block, linear) in voted]
        rows.append(Row(linear, charts.cells(len(blocks), cells), f"{sum(of) / len(of):.1%}"))
    alt = "Mean agreement over the blocks: " + ", ".join(f"{row.label} {row.value}" for row in rows) + "."
    return Chart("heat", alt, rows, charts.column_labels([str(block) for block in blocks]))


def _linear(row: Record) -> str:
    """The linear's name without its block: "self_attn.q_proj" of "model.layers.0.self_attn.q_proj.weight"."""
    name: str = row["name"].removesuffix(".weight")
    return name.rpartition(f".{row['block']}.")[2]


def _matrices(tensors: Iterable[Record]) -> Table:
    columns = [
        Column("matrix"), Column("weights", WHOLE), Column("zeros", WHOLE), Column("target", PERCENT),
        Column("achieved", PERCENT), Column("agreement", PERCENT), Column("clients", WHOLE), Column("SHA-256"),
    ]  # fmt: skip
    rows = [
        [r["name"], r["numel"], r["pruned"], r["target"], r["sparsity"], r.get("agreement"), len(r["clients"]), r["sha256"]]
        for r in tensors
    ]
    return Table("matrices", "Every pruned matrix, from pruning.json", columns, rows)


class Contributions:
    """Which client contributed what to a stage."""

    def __init__(self, summary: Summary, stage: Stage):
        self.stage = stage
        self.rounds = num_rounds(stage.plan)
        self.num_blocks: int = stage.plan["num_blocks"]
        self.clients = stage.clients
        self.unanswered = unanswered(summary, stage)
        self._history = _history(summary, stage.number)
        self._by_round: list[dict[str, list[int]]] = [{client: [] for client in self.clients} for _ in range(self.rounds)]
        for (round_, block), clients in sorted(contributors(summary, stage).items()):
            for client in clients:
                self._by_round[round_].setdefault(client, []).append(block)
        self._sent: dict[str, int] = dict.fromkeys(self.clients, 0)
        for row in summary.traffic:
            if (row.stage, row.direction) == (stage.number, "up") and row.kind in _requests(stage):
                self._sent[row.client] = self._sent.get(row.client, 0) + row.bytes

    def section(self, summary: Summary) -> Section:
        """The stage's section of the report."""
        sums: bool = self.stage.plan["sums"]
        did = "sent sums of" if sums else "pruned and sent sums of" if self.stage.plan.get("mends_votes") else "pruned"
        several = self.rounds > 1
        parts: list[Part] = []
        if all(len(blocks) == self.num_blocks for by_client in self._by_round for blocks in by_client.values()):
            each_round = f" in each of {self.rounds} rounds" if several else ""
            parts.append(Paragraph(f"Every client {did} all {self.num_blocks} blocks{each_round}."))
        else:
            drawn = f", drawn anew in each of {self.rounds} rounds" if several else ""
            rest = "were pruned without its sums" if sums else "were pruned without it"
            parts.append(Paragraph(f"Each client {did} the blocks that it was assigned{drawn}; the others {rest}."))
            more = "; a stronger color means more rounds, and the number is the total" if several else ", and their number"
            parts.append(Picture(self._map(), f"Blocks (columns) that each client (rows) {did}{more}."))
            if several:
                text = "The same, round by round (rows are clients, columns are blocks, in the order above):"
                parts.append(SmallMaps(text, self.num_blocks, len(self.clients), self._small_maps()))
            parts.append(Download("Blocks of every client in every round:", self._blocks_by_round()))
        if self.unanswered:
            who = ", ".join(f"{client} ({number})" for client, number in self.unanswered.items())
            parts.append(Paragraph(f"Some requests were not answered: {who}. The result does not include these contributions."))
        parts.append(Sheet(self._by_client()))
        if len({row["round"] for row in self._history}) > 1:
            parts.append(Sheet(self._rounds()))
        personal = personal_of(summary, self.stage)
        if personal:
            parts += [*map(Paragraph, personal.lines()), Sheet(personal.table())]
        return Section(f"stage-{self.stage.number}", numbered(summary, self.stage, "Who contributed what"), parts)

    def _by_client(self) -> Table:
        columns = [
            Column("client"), Column("blocks" if self.rounds == 1 else "blocks, all rounds", WHOLE),
            Column("weight in the sum", "{:.3g}".format), Column("windows", WHOLE), Column("own target", "{:.0%}".format),
            Column("upload planned", size), Column("upload", size), Column("memory planned", size),
        ]  # fmt: skip
        rows = []
        for client in self.clients:
            assignment = self.stage.plan["clients"][client]
            blocks = sum(len(by_client.get(client, ())) for by_client in self._by_round)
            planned = [assignment.get(key) for key in ("weight", "samples", "sparsity", "upload")]
            rows.append([client, blocks, *planned, self._sent[client], assignment.get("memory")])
        return Table(f"stage-{self.stage.number}-clients", f"Who did what in stage {self.stage.number}", columns, rows)

    def _rounds(self) -> Table:
        """Zeros and agreement of every round."""
        rows = []
        for round_ in sorted({row["round"] for row in self._history}):
            of = [row for row in self._history if row["round"] == round_]
            clients = len(set[str]().union(*(row["clients"] for row in of)))
            pruned, numel = (sum(row[key] for row in of) for key in ("pruned", "numel"))
            rows.append([f"round {round_}", len(of), clients, pruned, pruned / numel, agreement(of)])
        columns = [Column("round"), Column("blocks", WHOLE), Column("clients", WHOLE), Column("zeros", WHOLE)]
        columns += [Column("achieved", PERCENT), Column("agreement", PERCENT)]
        return Table(f"stage-{self.stage.number}-rounds", f"Rounds of stage {self.stage.number}", columns, rows)

    def _blocks_by_round(self) -> Table:
        """Every client's blocks in every round: only as CSV."""
        rows = [
            [client, *(";".join(map(str, by_client.get(client, ()))) for by_client in self._by_round)]
            for client in self.clients
        ]
        columns = [Column("client"), *(Column(f"round {round_}") for round_ in range(self.rounds))]
        return Table(f"stage-{self.stage.number}-blocks", "", columns, rows)

    def _map(self) -> Chart:
        """In how many rounds each client (row) worked on each block (column)."""
        rows = []
        for client in self.clients:
            cells: dict[int, tuple[float, str]] = {}
            for block in range(self.num_blocks):
                rounds = [round_ for round_, by_client in enumerate(self._by_round) if block in by_client.get(client, ())]
                if rounds:
                    says = f"{shortened(client)}, block {block}"
                    says += f": {plural(len(rounds), 'round')} ({ranges(rounds)})" if self.rounds > 1 else ""
                    cells[block] = (0.15 + 0.85 * len(rounds) / self.rounds, says)
            number = sum(len(by_client.get(client, ())) for by_client in self._by_round)
            rows.append(Row(client, charts.cells(self.num_blocks, cells), f"{number:,}"))
        alt = f"Blocks (columns, 0 to {self.num_blocks - 1}) that each client (rows) worked on; the table below counts them."
        return Chart("heat", alt, rows, charts.column_labels([str(block) for block in range(self.num_blocks)]))

    def _small_maps(self) -> list[tuple[str, str]]:
        """For each round: (what it shows, its path); rows and columns as in ``_map``."""
        return [
            (f"round {round_}", charts.runs([by_client.get(client, ()) for client in self.clients]))
            for round_, by_client in enumerate(self._by_round)
        ]
