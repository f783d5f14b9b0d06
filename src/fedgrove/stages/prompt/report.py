"""What the report, the terminal and the model card say about a stage that looks for a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedgrove.quantities import mebibytes
from fedgrove.report import charts
from fedgrove.report.charts import Chart, Row, Scale
from fedgrove.report.sections import Figure, Paragraph, Part, Picture, Section, Sheet, numbered
from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import Outcome, Stage, Summary
from fedgrove.report.terminal import client_table, fill, seconds
from fedgrove.report.words import plural, size

DID = "scored prompts for"
DOING = "looking for a prompt"
FILES = ("prompt.json",)
FOLDERS: tuple[str, ...] = ("prompt",)
TAGS: tuple[str, ...] = ()
CARD = "The model is the base model. A prompt for it is in `prompt/` beside it; the card there says how to use it."
MEASURED = {"no_prompt": "no prompt", "start_prompt": "the start", "found_prompt": "the prompt found"}
# Values of the key aggregation, here again because a report is written without the modules that need torch.
ALONE, VOTES = ("local", "mean"), "votes"
MOST_ROWS = 20  # of a chart


def describe(config: Mapping[str, Any]) -> str:
    """Such as "prompt by evolution, aggregation pooled"."""
    return f"prompt by {config.get('method', 'evolution')}, aggregation {config.get('aggregation', 'pooled')}"


def recipe(config: Mapping[str, Any]) -> str:
    """Rounds, candidates and records."""
    if not {"rounds", "population", "records"} <= config.keys():
        return ""
    rounds, records = plural(config["rounds"], "round"), plural(config["records"], "record")
    return f"{rounds} of {plural(config['population'], 'candidate')} on {records} of each client"


def limits(config: Mapping[str, Any]) -> str:
    says = (
        "The server chooses the candidates, and sees how each of them does on the records that were drawn: of a client with "
        "one record, that record's own loss."
    )
    if config.get("aggregation") == VOTES:
        says += " It also sees how many clients vote for each word; without secure aggregation, who does."
    return says


def plan_table(plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
    """What the stage costs each client."""
    title = f"stage {plan['stage']}: {describe(config)}; {recipe(config)}; {plural(plan['prompt_tokens'], 'token')} of prompt"
    table = client_table(title, "client", "memory", "forwards", "sent", "received", "time")
    for client, of in plan["clients"].items():
        cost = [
            mebibytes(of["memory"]),
            f"{of['forwards']:,}",
            size(of["upload"]),
            size(of["download"]),
            seconds(of["seconds"]),
        ]
        fill(table, client, *cost)
    each = Text(f"For every record {plan['passed']:,} tokens pass through the model in a round.")
    return Group(table, each, *(Text(f"{client} is left out: {why}") for client, why in sorted(plan["left_out"].items())))


def result_tables(summary: Summary, stage: Stage) -> list[RenderableType]:
    """How good the prompt is."""
    says = _says(summary, stage)
    return [Text("\n".join(says))] if says else []


def outcome(stage: Stage, files: Mapping[str, Any]) -> Outcome:
    """How the prompt was found."""
    made = files.get("prompt.json")
    if not made:
        return Outcome()
    return Outcome(f"a prompt of {plural(made['prompt_tokens'], 'token')} in {plural(made['rounds'], 'round')}")


def figures(summary: Summary, stage: Stage) -> list[Figure]:
    """How good the prompt is on each text, beside no prompt."""
    made, found = summary.files.get("prompt.json"), []
    for text, of in _measured(summary, stage).items():
        if made and "found_prompt" in of:
            what = f"right, {text}" if made["labels"] else f"loss, {text}"
            beside = f"{_show(made, of['no_prompt'])} with no prompt" if "no_prompt" in of else ""
            found.append(Figure(_show(made, of["found_prompt"]), what, beside))
    return found


def sections(summary: Summary, stage: Stage) -> list[Section]:
    """How the prompt was found, how good it is, and what that took."""
    made = summary.files.get("prompt.json")
    if not made or made["stage"] != stage.number:
        return []
    number, of_each = plural(made["rounds"], "round"), f"up to {plural(made['records'], 'record')} of its own"
    if made["aggregation"] in ALONE:
        says = f"In each of {number} every client searched alone ({made['method']}) on {of_each}, and the server combined that."
    elif "words_of_one" in made:
        says = (
            f"In each of {number} every client edited the prompt on {of_each} and voted for its words; of what the server "
            "merged, and of the old prompt, the one that was the best on records of all clients stayed."
        )
    else:
        candidates = plural(made["population"], "candidate")
        says = f"{made['method']} proposed {candidates} in each of {number}; every client scored the same ones on {of_each}."
    parts: list[Part] = [Paragraph(says)]
    if "words_of_one" in made:
        parts.append(Paragraph(_agreed(made["words_of_one"])))
    if "text" in made:
        parts.append(Paragraph(f"The prompt: “{made['text']}”, at the {made['place']} of a text."))
    parts += map(Paragraph, _says(summary, stage))
    show = "{:.1%}".format if made["labels"] else "{:.4f}".format
    measured = _measured(summary, stage)
    if measured:
        columns = [Column("held-out text"), Column("records", "{:,}".format)]
        columns += [Column(what, show) for what in MEASURED.values()]
        rows = [[text, made["texts"][text]["records"], *map(of.get, MEASURED)] for text, of in measured.items()]
        what = "How often the label is right" if made["labels"] else "Mean loss per token of the answer"
        parts.append(Sheet(Table(f"stage-{stage.number}-prompt", what, columns, rows)))
    rounds = _rounds(summary, stage)
    for column, what in (("bytes", "bytes that all clients sent and received"), ("calls", "scores that all clients computed")):
        chart = _chart(rounds, column, made)
        if chart:
            parts.append(Picture(chart, f"The best candidate's cost in a round, against the {what} up to it."))
    columns = [Column("round"), Column("records", "{:,}".format), Column("skipped", "{:,}".format)]
    columns += [Column("forwards so far", "{:,}".format), Column("bytes so far", size)]
    columns += [Column("cost, best", "{:.4f}".format), Column("cost, mean", "{:.4f}".format)]
    keys = ("round", "records", "skipped", "calls", "bytes", "best", "mean")
    table = Table(f"stage-{stage.number}-rounds", "Round by round", columns, [[of.get(key) for key in keys] for of in rounds])
    title = numbered(summary, stage, "A prompt")
    return [Section(f"stage-{stage.number}", title, [*parts, Sheet(table, folded=True)])]


def _show(made: Mapping[str, Any], value: float) -> str:
    return f"{value:.1%}" if made["labels"] else f"{value:.3f}"


def _agreed(words: Sequence[str]) -> str:
    """What the report says of words that a single client brought in."""
    if not words:
        return "Every word of the prompt was there at the start, or two clients or more voted for it."
    said = ", ".join(f"“{word.strip()}”" for word in words)
    return f"For {said} only one client voted: look at such words before the prompt is given away or sent to an endpoint."


def _measured(summary: Summary, stage: Stage) -> dict[str, dict[str, float]]:
    """By held-out text and prompt: how often the label is right, or the loss."""
    found: dict[str, dict[str, float]] = {}
    for (number, round_, client, name), value in summary.rounds_measured.items():
        measure, _, text = name.partition("/")
        if (number, round_, client) == (stage.number, None, None) and measure in MEASURED:
            found.setdefault(text, {})[measure] = value
    return found


def _says(summary: Summary, stage: Stage) -> list[str]:
    made = summary.files.get("prompt.json")
    says = []
    for text, of in _measured(summary, stage).items():
        if made and "found_prompt" in of:
            shown = [f"{_show(made, of[key])} with {what}" for key, what in MEASURED.items() if key in of]
            says.append(f"{text}: {'right label' if made['labels'] else 'loss'} {', '.join(shown)}.")
    return says


def _rounds(summary: Summary, stage: Stage) -> list[dict[str, Any]]:
    """What was measured in each round, with the bytes and scores of all rounds up to it."""
    rows: dict[int, dict[str, Any]] = {}
    for (number, round_, client, name), value in summary.rounds_measured.items():
        if number == stage.number and round_ is not None and client is None:
            whole = name in ("records", "skipped", "calls")
            rows.setdefault(round_, {"round": round_})[name] = int(value) if whole else value
    sent: dict[int, int] = {}
    for direction in ("up", "down"):
        for (number, round_), by_client in summary.sent_by_round(direction).items():
            if number == stage.number:
                sent[round_] = sent.get(round_, 0) + sum(by_client.values())
    calls = 0
    for round_ in sorted(rows):
        calls += rows[round_].get("calls", 0)
        rows[round_] |= {"calls": calls, "bytes": sum(count for earlier, count in sent.items() if earlier <= round_)}
    return [rows[round_] for round_ in sorted(rows)]


def _chart(rounds: list[dict[str, Any]], column: str, made: Mapping[str, Any]) -> Chart | None:
    """A dot for each round: the best candidate's cost. The last round compares others on other records, so it has none."""
    known = [row for row in rounds if "best" in row and row["round"] < made["rounds"]]
    if len(known) < 2:
        return None
    shown = known[:: -(-len(known) // MOST_ROWS)]
    shown += [known[-1]] if shown[-1] is not known[-1] else []
    scale = Scale.over(row["best"] for row in shown)
    rows = []
    for row in shown:
        so_far = size(row["bytes"]) if column == "bytes" else f"{row['calls']:,} scores"
        dot = charts.dot(scale, row["best"], "federated", f"round {row['round']}: {row['best']:.4f} after {so_far}")
        rows.append(Row(so_far, charts.grid(scale) + dot, f"{row['best']:.4f}"))
    what = "Fraction of wrong labels" if made["score"] == "correct" else "Loss"
    alt = f"{what} of the best candidate: {rows[0].value} after {rows[0].label}, {rows[-1].value} after {rows[-1].label}."
    labels = [f"{value:g}" for value in scale.ticks]
    return Chart("dots", alt, rows, charts.tick_labels(scale, labels), [("federated", f"{what}, best candidate of a round")])
