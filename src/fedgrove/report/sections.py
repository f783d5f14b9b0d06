"""What a kind of stage adds to the report: the protocol of ``stages/KIND/report.py``, and the parts of its sections.

The report has no code for any kind of stage. It loads ``fedgrove.stages.KIND.report`` by the name in the job
(:mod:`fedgrove.report.stage_reports`); a kind without that file is shown by :mod:`fedgrove.report.any_stage`. Such a
file reads plain data only (the stage's table in the job, its plan, its JSON files), and imports neither torch nor the
rest of its stage, so that a report is fast and needs no model.
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
    """Text; ``note``: in small print. A :class:`markupsafe.Markup` may contain HTML, everything else is escaped."""

    text: str
    note: bool = False
    part: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Bullets:
    """A list of lines."""

    lines: Sequence[str]
    part: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Picture:
    """A chart with a caption."""

    chart: Chart
    caption: str
    part: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Sheet:
    """A table; ``folded``: collapsed until the reader opens it."""

    table: Table
    folded: bool = False
    part: ClassVar[str] = "sheet"


@dataclass(frozen=True)
class Download:
    """A table that is not shown but offered as CSV, after a line of text."""

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
    """A section of the page. ``id``: the HTML id of its heading, unique on the page."""

    id: str
    title: str
    parts: Sequence[Part]


class StageReport(Protocol):
    """The protocol of ``stages/KIND/report.py``.

    Attributes:
        DID: what the clients did, as past tense and participle: "pruned".
        DOING: the same as a noun: "pruning", as in "after pruning"; "": the name of the kind is used.
        FILES: JSON files that the stage writes into the run folder in addition to its plan.
        FOLDERS: folders that it writes there, beside the model: such as an adapter.
        TAGS: tags for the model card.
        CARD: what users of the result should know, for the model card; "": nothing.
    """

    DID: str
    DOING: str
    FILES: tuple[str, ...]
    FOLDERS: tuple[str, ...]
    TAGS: tuple[str, ...]
    CARD: str

    def describe(self, config: Mapping[str, Any]) -> str:
        """The stage in a few words, from its table in the job: "prune with sparsegpt to 50%, aggregation fedspallm"."""
        ...

    def recipe(self, config: Mapping[str, Any]) -> str:
        """The amount of work: "16 windows of 512 tokens from each client"; "": not stated."""
        ...

    def limits(self, config: Mapping[str, Any]) -> str:
        """Sentences about limits on what the plan discloses; "": none."""
        ...

    def plan_table(self, plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
        """The plan for a terminal: each client's work, and the capabilities on which it depends."""
        ...

    def result_tables(self, summary: Summary, stage: Stage) -> list[RenderableType]:
        """Tables and sentences of the stage that a terminal shows above the results when a run has ended."""
        ...

    def outcome(self, stage: Stage, files: Mapping[str, Any]) -> Outcome:
        """The outcome of the stage.

        Args:
            stage: its table and plan.
            files: the content of those ``FILES`` that exist, by name.
        """
        ...

    def figures(self, summary: Summary, stage: Stage) -> list[Figure]:
        """The stage's large numbers at the top of the page."""
        ...

    def sections(self, summary: Summary, stage: Stage) -> list[Section]:
        """The stage's sections of the page."""
        ...


def numbered(summary: Summary, stage: Stage, title: str) -> str:
    """A title, with the stage's number if there are several stages."""
    return f"{title}: stage {stage.number}" if len(summary.stages) > 1 else title
