"""A stage's plan as a table for a terminal, whatever its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from fedgrove.report.stage_reports import report_of


def plan_table(plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
    """The table of a plan, from the content of ``RUN/plan-N-KIND.json`` and the stage's table in ``RUN/job.toml``."""
    return report_of(plan["kind"]).plan_table(plan, config)
