"""What owners who were kept out of a run (``evaluate.new``) would get from its pool: from ``RUN/new.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedgrove.report.owners import over_owners
from fedgrove.report.personal import Z
from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import Stage, Summary
from fedgrove.report.words import plural

NEW = "new.json"
NONE, SHARED = "none", "shared"  # candidates that every owner has


@dataclass(frozen=True)
class Newcomers:
    """What owners who were not there would get.

    Attributes:
        stage: the stage that left the pool.
        owners: by name, what :class:`~fedgrove.stages.tune.pool.newcomers.Adopted` says of it.
    """

    stage: int
    owners: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, summary: Summary, stage: Stage) -> Newcomers | None:
        """None if nobody was kept out of the run, or another stage left the pool."""
        said = summary.files.get(NEW)
        return cls(stage.number, said["owners"]) if said and said["stage"] == stage.number else None

    def lines(self) -> list[str]:
        """Averages and the worst owner, with what each gets and with the shared adapter; windows and forward passes."""
        show, windows = "{:.3f}".format, {name: float(of["windows"]) for name, of in self.owners.items()}
        better = [name for name in self.owners if self._gain(name) > 0]
        gets = over_owners({name: self._loss(name) for name in self.owners}, windows)
        shared = over_owners({name: of["losses"][SHARED] for name, of in self.owners.items()}, windows)
        forwards = sum(of["forwards"] for of in self.owners.values())
        seconds = sum(of["seconds"] for of in self.owners.values())
        return [
            f"{plural(len(self.owners), 'owner')} had no part in the run. With what fedgrove adopt gives, the loss on text of "
            f"their own that no choice has seen is {gets.says(show, by='windows')}.",
            f"With the shared adapter: {shared.says(show, by='windows')}. {len(better)} of {len(self.owners)} are better off "
            f"than with it. Nothing was trained for them: {forwards:,} forward passes of a window, {seconds:.1f} s.",
        ]

    def table(self) -> Table:
        """Each owner's losses without an adapter, with the shared one, and with what it gets."""
        number = "{:.3f}".format
        columns = [Column("owner"), Column("loss, no adapter", number), Column("loss, shared", number), Column("gets")]
        columns += [Column("loss", number), Column("gain over shared", "{:+.3f}".format), Column("±", number)]
        columns += [Column("like nothing known", "{:.0%}".format)]
        rows = []
        for name, of in sorted(self.owners.items()):
            error = None if of["error"] is None else Z * of["error"]
            row = [name, of["losses"][NONE], of["losses"][SHARED], of["choice"], self._loss(name), self._gain(name)]
            rows.append([*row, error, of["unlike"]])
        caption = "What owners who were not there get from the pool, on their own text that no choice has seen"
        return Table(f"stage-{self.stage}-new", caption, columns, rows)

    def _loss(self, name: str) -> float:
        loss: float = self.owners[name]["losses"][self.owners[name]["choice"]]
        return loss

    def _gain(self, name: str) -> float:
        return float(self.owners[name]["losses"][SHARED]) - self._loss(name)
