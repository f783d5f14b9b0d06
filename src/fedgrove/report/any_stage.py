"""The report of a kind of stage without its own ``report.py``: its name, its clients and their messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from fedgrove.report.sections import Figure, Section, Sheet, numbered
from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import Outcome, Stage, Summary
from fedgrove.report.terminal import client_table, fill
from fedgrove.report.words import capitalized, size

DID = "changed"
DOING = ""
FILES: tuple[str, ...] = ()
FOLDERS: tuple[str, ...] = ()
TAGS: tuple[str, ...] = ()
CARD = ""


def describe(config: Mapping[str, Any]) -> str:
    """The kind's name, and the method if the table has one."""
    return f"{config['kind']} with {config['method']}" if "method" in config else str(config["kind"])


def recipe(config: Mapping[str, Any]) -> str:
    return ""


def limits(config: Mapping[str, Any]) -> str:
    return ""


def plan_table(plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
    """All numbers and strings that the plan has for each client."""
    if not plan["clients"]:
        return Text(f"stage {plan['stage']}: {plan['kind']}; no client takes part")
    assignments: Mapping[str, Mapping[str, Any]] = plan["clients"]
    keys = [
        key
        for key in dict.fromkeys(key for assignment in assignments.values() for key in assignment)
        if all(isinstance(assignment.get(key, ""), int | float | str) for assignment in assignments.values())
    ]
    table = client_table(f"stage {plan['stage']}: {plan['kind']}", "client", *keys)
    for client, assignment in assignments.items():
        fill(table, client, *(str(assignment.get(key, "")) for key in keys))
    return table


def result_tables(summary: Summary, stage: Stage) -> list[RenderableType]:
    return []


def outcome(stage: Stage, files: Mapping[str, Any]) -> Outcome:
    return Outcome()


def figures(summary: Summary, stage: Stage) -> list[Figure]:
    return []


def sections(summary: Summary, stage: Stage) -> list[Section]:
    """A table of each client's messages and their bytes; no section if there are no clients."""
    messages: dict[str, dict[str, list[int]]] = {client: {"up": [0, 0], "down": [0, 0]} for client in stage.clients}
    rows = [row for row in summary.traffic if row.stage == stage.number and not row.overhead]
    for row in rows:
        total = messages.setdefault(row.client, {"up": [0, 0], "down": [0, 0]})[row.direction]
        total[0] += row.messages
        total[1] += row.bytes
    if not messages:
        return []
    columns = [Column("client")]
    columns += [Column("messages sent", "{:,}".format), Column("sent", size)]
    columns += [Column("messages received", "{:,}".format), Column("received", size)]
    table = Table(
        f"stage-{stage.number}-messages",
        f"Messages of stage {stage.number}",
        columns,
        [[client, *of["up"], *of["down"]] for client, of in sorted(messages.items())],
    )
    return [Section(f"stage-{stage.number}", numbered(summary, stage, capitalized(stage.kind)), [Sheet(table)])]
