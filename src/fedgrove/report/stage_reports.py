"""Finds ``stages/KIND/report.py`` by the kind's name."""

from __future__ import annotations

from typing import cast

from fedgrove import plugins
from fedgrove.report import any_stage
from fedgrove.report.sections import StageReport

STAGES, FILE = "stages", "report"


def report_of(kind: str) -> StageReport:
    """The report module of a kind of stage; see :class:`~fedgrove.report.sections.StageReport`.

    For a kind without such a file, or an unknown kind, it is :mod:`fedgrove.report.any_stage`.

    Raises:
        FedgroveError: the file lacks part of the protocol.
    """
    if kind in plugins.names(STAGES, folders=True) and FILE in plugins.names(f"{STAGES}.{kind}"):
        return cast(StageReport, plugins.load(f"{STAGES}.{kind}", FILE, StageReport))
    return cast(StageReport, any_stage)


def stage_files() -> list[str]:
    """The names of all files that stages may write into the run folder in addition to their plans, sorted."""
    return sorted({file for kind in plugins.names(STAGES, folders=True) for file in report_of(kind).FILES})


def stage_folders() -> list[str]:
    """The names of all folders that stages may write into the run folder beside the model, sorted."""
    return sorted({folder for kind in plugins.names(STAGES, folders=True) for folder in report_of(kind).FOLDERS})
