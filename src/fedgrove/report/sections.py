"""What a kind of stage gives the report: the protocol of ``stages/KIND/report.py``, and the parts of its sections.

The report knows no kind of stage. It loads ``fedgrove.stages.KIND.report`` by the name in the job
(:mod:`fedgrove.report.stage_reports`), and a kind without that file is shown by :mod:`fedgrove.report.any_stage`. Such a
file reads plain data only (the stage's table in the job, its plan, its JSON files), and imports neither torch nor the rest of
its stage: a report must be there at once, and without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from rich.console import RenderableType

from fedgrove.report.charts import Chart
from fedgrove.report.sheet import Table
from fedgrove.report.summary import Outcome, Stage, Summary


class Figure(NamedTuple):
    """One of the large numbers at the top of the page."""

    number: str
    what: str
    context: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Text; ``note``: in small. A :class:`markupsafe.Markup` may hold HTML, everything else is escaped."""

    text: str
    note: bool = False
    part: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Bullets:
    """A list."""

    lines: Sequence[str]
    part: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Picture:
    """A chart and what it shows."""

    chart: Chart
    caption: str
    part: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Sheet:
    """A table; ``folded``: shown only when asked."""

    table: Table
    folded: bool = False
    part: ClassVar[str] = "sheet"


@dataclass(frozen=True)
class Download:
    """A table that is offered as CSV and not shown, behind a line of text."""

    text: str
    table: Table
    part: ClassVar[str] = "download"


@dataclass(frozen=True)
class SmallMaps:
    """Small maps side by side.

    Attributes:
        text: what they show.
        width, height: cells of each.
        maps: (title, path), the path as :func:`fedgrove.report.charts.runs` makes it.
    """

    text: str
    width: int
    height: int
    maps: Sequence[tuple[str, str]]
    part: ClassVar[str] = "small_maps"


Part = Paragraph | Bullets | Picture | Sheet | Download | SmallMaps


@dataclass(frozen=True)
class Section:
    """A section of the page. ``id``: of its heading, once on the page."""

    id: str
    title: str
    parts: Sequence[Part]


class StageReport(Protocol):
    """``stages/KIND/report.py``.

    Attributes:
        DID: what clients did together, in the past tense, which is also the participle: "pruned".
        DOING: the same as a noun: "pruning", as in "after pruning"; "": the name of the kind.
        FILES: JSON files that the stage writes into the run folder, besides its plan.
        TAGS: of the model card.
        CARD: what whoever uses the result should know, for the model card; "": nothing.
    """

    DID: str
    DOING: str
    FILES: tuple[str, ...]
    TAGS: tuple[str, ...]
    CARD: str

    def describe(self, config: Mapping[str, Any]) -> str:
        """The stage in a few words, from its table in the job: "prune with sparsegpt to 50%, aggregation fedspallm"."""
        ...

    def recipe(self, config: Mapping[str, Any]) -> str:
        """How much work it was: "16 windows of 512 tokens from each client"; "": nothing to say."""
        ...

    def limits(self, config: Mapping[str, Any]) -> str:
        """What this stage keeps back of that which its plan discloses, in whole sentences; "": nothing."""
        ...

    def plan_table(self, plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
        """The plan for a terminal: what each client is given, and by what it has, why."""
        ...

    def result_tables(self, stage: Stage) -> list[RenderableType]:
        """What a terminal shows of the stage when a run has ended, above the results."""
        ...

    def outcome(self, stage: Stage, files: Mapping[str, Any]) -> Outcome:
        """What the stage came to.

        Args:
            stage: its table and plan.
            files: those of ``FILES`` that are there, by name.
        """
        ...

    def figures(self, summary: Summary, stage: Stage) -> list[Figure]:
        """Its large numbers at the top of the page."""
        ...

    def sections(self, summary: Summary, stage: Stage) -> list[Section]:
        """Its sections of the page."""
        ...


def numbered(summary: Summary, stage: Stage, title: str) -> str:
    """A title with the stage's number, where there are several stages."""
    return f"{title}: stage {stage.number}" if len(summary.stages) > 1 else title
