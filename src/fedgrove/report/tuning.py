"""The page's part on a stage that tunes: who was given what and why, which matrices matter, and what came of it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from fedgrove.report import charts
from fedgrove.report.charts import Chart, Row
from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import PERPLEXITY, Summary
from fedgrove.report.words import plural, size

MOST_COLUMNS = 8  # the ranks of more clients than this share three columns: lowest, mean, highest
METHODS = {
    "fedpipe": "each client was given the bits, batch and ranks that its memory, speed and uplink allow",
    "lora": "every client was given what the weakest can hold",
    "full": "every client trained the whole matrices",
}


class Tuning:
    """A stage of tuning, from ``plan-N-tune.json`` and the metrics."""

    def __init__(self, summary: Summary, plan: dict[str, Any]):
        self.number: int = plan["stage"]
        self.whole: bool = plan["parametrization"] == "full"
        self.left_out: dict[str, str] = dict(sorted(plan["left_out"].items()))
        self._plan = plan
        self._clients = sorted(plan["clients"])
        self._measured = {key[1:]: value for key, value in summary.rounds_measured.items() if key[0] == self.number}
        self._rounds = sorted({r for r, _, name in self._measured if r is not None and name == "loss"})

    @property
    def scored(self) -> bool:
        """Whether the clients were asked which matrices matter."""
        return bool(self._plan["planner"] == "fedpipe")

    @property
    def says(self) -> str:
        """What happened, in a sentence or two."""
        method = self._plan["planner"] if self._plan["planner"] != "uniform" else self._plan["parametrization"]
        parts = [
            f"{plural(len(self._clients), 'client')} trained for {plural(len(self._rounds), 'round')}: {METHODS.get(method, method)}."
        ]
        clock = self._of_round(self._rounds[-1], "clock") if self._rounds else None
        if clock is not None:
            parts.append(
                f"On machines like those that they say they have it takes {clock:,.1f} s (modelled: {_slowest(self._plan)})."
            )
        return " ".join(parts)

    @property
    def given(self) -> Table:
        """Every client: what it has, what it was given, what it was to take, and its losses."""
        columns = [
            Column("client"), Column("tokens", "{:,}".format), Column("memory", size), Column("speed", "{:g}".format),
            Column("uplink, Mbit/s", "{:g}".format), Column("devices", "{:g}".format), Column("bits", "{:g}".format),
            Column("batch", "{:g}".format), Column("at once", "{:g}".format), Column("matrices", "{:g}".format),
            Column("rank, mean", "{:.1f}".format), Column("memory planned", size), Column("upload a round", size),
            Column("time a round", "{:,.2f} s".format), Column("loss, first round", "{:.3f}".format),
            Column("loss, last round", "{:.3f}".format),
        ]  # fmt: skip
        rows = []
        for client in self._clients:
            share, card = self._plan["clients"][client], self._plan["capabilities"][client]
            ranks = share["ranks"]
            uplink = card["uplink"] / 1e6 if card["uplink"] else None
            losses = [self._measured.get((r, client, "loss")) for r in self._rounds]
            heard = [loss for loss in losses if loss is not None]
            rows.append([
                client, share["tokens"], card["memory"], card["speed"], uplink, share.get("devices", 1), share["bits"],
                share["batch"], share["micro"], len(ranks) or len(self._plan["importance"]),
                sum(ranks.values()) / len(ranks) if ranks else None, share["memory"], share["upload"], share["seconds"],
                heard[0] if heard else None, heard[-1] if heard else None,
            ])  # fmt: skip
        return Table(f"stage-{self.number}-given", "What each client has, and what it was given", columns, rows)

    @property
    def importance_map(self) -> Chart | None:
        """Importance of each linear (rows) in each block (columns); None where nobody was asked."""
        if not self.scored:
            return None
        importance: dict[str, float] = self._plan["importance"]
        places = {name: _place(name) for name in importance}
        blocks = sorted({block for block, _ in places.values()})
        highest = max(importance.values()) or 1.0
        rows = []
        for linear in dict.fromkeys(linear for _, linear in places.values()):
            of = {places[name][0]: name for name in importance if places[name][1] == linear}
            found = {
                column: (
                    0.05 + 0.95 * importance[of[block]] / highest,
                    f"block {block}, {linear}: {importance[of[block]]:.2%}, {self._ranks_say(of[block])}",
                )
                for column, block in enumerate(blocks)
                if block in of
            }
            rows.append(Row(linear, charts.cells(len(blocks), found), f"{sum(importance[name] for name in of.values()):.1%}"))
        alt = "Importance by kind of matrix, over all blocks: " + ", ".join(f"{row.label} {row.value}" for row in rows) + "."
        return Chart("heat", alt, rows, charts.column_labels([str(block) for block in blocks]))

    @property
    def linears(self) -> Table | None:
        """Every linear: its importance and the ranks that it was given."""
        if self.whole:
            return None
        few = len(self._clients) <= MOST_COLUMNS
        titles = [f"rank, {client}" for client in self._clients] if few else ["rank, lowest", "rank, mean", "rank, highest"]
        rows = []
        for name, share in self._plan["importance"].items():
            ranks = self._ranks(name)
            rows.append([name, share, *(ranks if few else (min(ranks), sum(ranks) / len(ranks), max(ranks)))])
        columns = [Column("matrix"), Column("importance", "{:.2%}".format), *(Column(title, "{:g}".format) for title in titles)]
        return Table(f"stage-{self.number}-importance", "Importance of every matrix, and the rank it was given", columns, rows)

    @property
    def rounds(self) -> Table | None:
        """Every round: the clients' loss, modelled time, and held-out perplexity where it was measured."""
        if not self._rounds:
            return None
        texts = sorted({name for r, c, name in self._measured if r is not None and c is None and name.startswith(PERPLEXITY)})
        columns = [
            Column("round"),
            Column("loss of the clients, mean", "{:.3f}".format),
            Column("modelled seconds", "{:,.2f}".format),
        ]
        columns += [Column(f"perplexity, {text.removeprefix(PERPLEXITY)}", "{:.1f}".format) for text in texts]
        rows = [[r, *(self._of_round(r, name) for name in ("loss", "clock", *texts))] for r in self._rounds]
        return Table(f"stage-{self.number}-rounds", "Round by round", columns, rows)

    @cached_property
    def personal(self) -> Table | None:
        """Who kept an adapter of its own, and what it gains by it."""
        rows = []
        for client in self._clients:
            own, shared = (self._measured.get((None, client, f"personal/{which}")) for which in ("own", "shared"))
            if own is not None and shared is not None:
                rows.append([client, shared, own, "its own" if own < shared else "the shared one"])
        columns = [
            Column("client"),
            Column("loss, shared", "{:.3f}".format),
            Column("loss, own best", "{:.3f}".format),
            Column("keeps"),
        ]
        caption = "The shared adapter and each client's own best, on text that the client held out for itself"
        return Table(f"stage-{self.number}-personal", caption, columns, rows) if rows else None

    @property
    def gained(self) -> str:
        """Who gains by an adapter of its own."""
        names = [row[0] for row in self.personal.rows if row[2] < row[1]] if self.personal else []
        if not names:
            return "No client has an adapter of its own that is better for it than the shared one."
        return f"Better off with an adapter of its own, which it keeps for itself: {', '.join(names)}."

    def _of_round(self, round_: int, name: str) -> float | None:
        return self._measured.get((round_, None, name))

    def _ranks(self, linear: str) -> list[int]:
        return [self._plan["clients"][client]["ranks"].get(linear, 0) for client in self._clients]

    def _ranks_say(self, linear: str) -> str:
        ranks = self._ranks(linear)
        if not any(ranks):
            return "tuned by nobody"
        return f"rank {min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"rank {max(ranks)}"


def _slowest(plan: dict[str, Any]) -> str:
    client = max(sorted(plan["clients"]), key=lambda name: plan["clients"][name]["seconds"])
    return f"a round ends when the slowest has answered, most often {client}"


def _place(linear: str) -> tuple[int, str]:
    """(3, "mlp.up_proj") of "model.layers.3.mlp.up_proj"."""
    parts = linear.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return int(parts[at]), ".".join(parts[at + 1 :])
