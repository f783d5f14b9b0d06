"""Finds ``stages/KIND/report.py`` by the kind's name, which is the whole registry."""

from __future__ import annotations

from typing import cast

from fedgrove import plugins
from fedgrove.report import any_stage
from fedgrove.report.sections import StageReport

STAGES, FILE = "stages", "report"


def report_of(kind: str) -> StageReport:
    """What a kind of stage gives the report; see :class:`~fedgrove.report.sections.StageReport`.

    A kind that has no such file, or whose folder is not here, is shown by :mod:`fedgrove.report.any_stage`.

    Raises:
        FedgroveError: its file lacks part of the protocol.
    """
    if kind in plugins.names(STAGES, folders=True) and FILE in plugins.names(f"{STAGES}.{kind}"):
        return cast(StageReport, plugins.load(f"{STAGES}.{kind}", FILE, StageReport))
    return cast(StageReport, any_stage)


def stage_files() -> list[str]:
    """The files that any kind of stage may write into the run folder, besides its plan."""
    return sorted({file for kind in plugins.names(STAGES, folders=True) for file in report_of(kind).FILES})
