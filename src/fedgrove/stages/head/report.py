"""What the report, the terminal and the model card say about a stage that makes a head: from its plan and ``head.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedgrove.quantities import mebibytes
from fedgrove.report.owners import OverOwners, over_owners
from fedgrove.report.personal import without_comparison
from fedgrove.report.sections import Figure, Paragraph, Part, Section, Sheet, numbered
from fedgrove.report.sheet import Column, Table
from fedgrove.report.summary import Outcome, Stage, Summary
from fedgrove.report.terminal import client_table, fill, megabytes, seconds
from fedgrove.report.words import listed, plural

DID = "made a classification head for"
DOING = "making a head"
FILES = ("head.json",)
FOLDERS: tuple[str, ...] = ("head",)
TAGS: tuple[str, ...] = ()
CARD = "The model is the base model. A classification head for its hidden states is in `head/` beside it, with a loader."
MEASURED, LABELED = "head/", "labeled/"
PERSONAL = {"shared": "the head of all", "personal": "its own form of it", "own": "from its own records alone"}


def describe(config: Mapping[str, Any]) -> str:
    """Such as "ridge head of 20 labels on layer −1"."""
    layers = ", ".join(str(layer) for layer in config.get("layers", (-1,))).replace("-", "−")
    return f"{config.get('head', 'ridge')} head of {plural(len(config['labels']), 'label')} on layer {layers}"


def recipe(config: Mapping[str, Any]) -> str:
    """How much of a record is read."""
    return f"the first {config['length']} tokens of each record" if "length" in config else ""


def limits(config: Mapping[str, Any]) -> str:
    return "Where only one record has a label, the sum of that label is that record's features."


def plan_table(plan: Mapping[str, Any], config: Mapping[str, Any]) -> RenderableType:
    """What the stage costs each client."""
    title = f"stage {plan['stage']}: {describe(config)}; {_features(plan)}"
    table = client_table(title, "client", "memory", "upload", "time of 1,000 records")
    for client, assignment in plan["clients"].items():
        cost = [mebibytes(assignment["memory"]), megabytes(assignment["upload"]), seconds(assignment["seconds"])]
        fill(table, client, *cost)
    return Group(table, *(Text(f"{client} is left out: {why}") for client, why in sorted(plan["left_out"].items())))


def result_tables(summary: Summary, stage: Stage) -> list[RenderableType]:
    """How often the head is right."""
    return [Text("\n".join([*_says(summary, stage), *_guesses_say(summary, stage), *_personal_says(summary, stage)]))]


def outcome(stage: Stage, files: Mapping[str, Any]) -> Outcome:
    """What the head was made from."""
    made = files.get("head.json")
    return Outcome(f"{describe(made)} from {made['records']:,} records") if made else Outcome()


def figures(summary: Summary, stage: Stage) -> list[Figure]:
    """The accuracy on each text."""
    return [
        Figure(f"{of[None]:.1%}", f"right, {text}", _alone(of, "{:.1%}".format))
        for text, of in _accuracies(summary, stage).items()
        if None in of
    ]


def sections(summary: Summary, stage: Stage) -> list[Section]:
    """What the head was made from, and how often it is right."""
    made = summary.files.get("head.json")
    if not made or made["stage"] != stage.number:
        return []
    says = (
        f"A linear classifier ({made['head']}) on the hidden states of the frozen model, from {made['records']:,} records of "
        f"{plural(len(made['clients']) - len(made['unlabeled']), 'owner')}: {_features(stage.plan)}. It is the head that the "
        "pooled records give. A program that loads it is in head/README.md."
    )
    told = [*_says(summary, stage), *_guesses_say(summary, stage), *_personal_says(summary, stage)]
    parts: list[Part] = [Paragraph(says), *map(Paragraph, told)]
    accuracies, percent = _accuracies(summary, stage), "{:.1%}".format
    if accuracies:
        columns = [Column("held-out text"), Column("records", "{:,}".format), Column("head of all", percent)]
        columns += [Column("alone, mean", percent), Column("alone, best", percent), Column("alone, worst", percent)]
        rows: list[list[Any]] = []
        for text, of in accuracies.items():
            alone = [value for client, value in of.items() if client is not None]
            spread = [sum(alone) / len(alone), max(alone), min(alone)] if alone else [None, None, None]
            rows.append([text, made["texts"].get(text), of.get(None), *spread])
        parts.append(Sheet(Table(f"stage-{stage.number}-head", "How often the head finds the label", columns, rows)))
    compared = _personal(summary, stage)
    if compared:
        columns = [Column("client"), Column("records", "{:,}".format), *(Column(name, percent) for name in PERSONAL.values())]
        rows = [[client, of["records"], *(of.get(key) for key in PERSONAL)] for client, of in compared.items()]
        caption = "How often three heads find the label of records that each client held out"
        parts.append(Sheet(Table(f"stage-{stage.number}-own-heads", caption, columns, rows)))
    columns = [Column("label"), Column("records", "{:,}".format)]
    if made["unlabeled"]:
        columns.append(Column("guessed", "{:,}".format))
    rows = [[label, number, made["guessed"][label]][: len(columns)] for label, number in made["counts"].items()]
    counts = Table(f"stage-{stage.number}-labels", "Records of each label", columns, rows)
    return [
        Section(
            f"stage-{stage.number}", numbered(summary, stage, "A classification head"), [*parts, Sheet(counts, folded=True)]
        )
    ]


def _features(plan: Mapping[str, Any]) -> str:
    projected = f", projected from {plan['states']:,}" if plan["features"] < plan["states"] else ""
    return f"{plan['features']:,} features{projected}, after {plan['blocks']} of {plan['num_blocks']} blocks"


def _accuracies(summary: Summary, stage: Stage) -> dict[str, dict[str | None, float]]:
    """By held-out text: the accuracy of the head of all (None), and of each client's own."""
    found: dict[str, dict[str | None, float]] = {}
    for (number, _, client, name), value in summary.rounds_measured.items():
        if number == stage.number and name.startswith(MEASURED):
            found.setdefault(name.removeprefix(MEASURED), {})[client] = value
    return found


def _alone(of: Mapping[str | None, float], show: Any) -> str:
    alone = {client: value for client, value in of.items() if client is not None}
    if not alone:
        return ""
    over = over_owners(alone, dict.fromkeys(alone, 1.0), higher_is_better=True)
    return f"heads of one owner's records: {show(over.plain)} in the mean, {show(over.worst[1])} the worst ({over.worst[0]})"


def _says(summary: Summary, stage: Stage) -> list[str]:
    """How often the head is right on each held-out text."""
    says = []
    for text, of in _accuracies(summary, stage).items():
        if None in of:
            alone = _alone(of, "{:.1%}".format)
            says.append(f"The head finds the label of {of[None]:.1%} of {text}{f'; {alone}' if alone else ''}.")
    return says


def _guesses_say(summary: Summary, stage: Stage) -> list[str]:
    """Who guessed labels, and what that is worth on each held-out text."""
    made = summary.files.get("head.json") or {}
    if not made.get("unlabeled"):
        return []
    measured = summary.rounds_measured
    unlabeled = made["unlabeled"]
    says = [
        f"{listed(unlabeled)} {'have' if len(unlabeled) > 1 else 'has'} no labels: {sum(made['guessed'].values()):,} of their "
        f"records were added with guessed ones, in {plural(made['guesses'], 'exchange')}."
    ]
    for text, of in _accuracies(summary, stage).items():
        before = measured.get((stage.number, None, None, f"{LABELED}{text}"))
        if before is not None and None in of:
            says.append(f"Without guesses, the head finds the label of {before:.1%} of {text}.")
    return says


def _personal(summary: Summary, stage: Stage) -> dict[str, dict[str, float]]:
    """By client, the records that it held out, and how often each of three heads is right on them."""
    found: dict[str, dict[str, float]] = {}
    for client in stage.clients:
        for key in ("records", *PERSONAL):
            value = summary.rounds_measured.get((stage.number, None, client, f"personal/{key}"))
            if value is not None:
                found.setdefault(client, {})[key] = int(value) if key == "records" else value
    return {client: of for client, of in found.items() if "shared" in of}


def _personal_says(summary: Summary, stage: Stage) -> list[str]:
    """Both averages over owners and the worst owner, for each of the three heads."""
    compared = _personal(summary, stage)
    says = []
    for key, name in PERSONAL.items():
        values = {client: of[key] for client, of in compared.items() if key in of}
        if values:
            over: OverOwners = over_owners(values, {client: compared[client]["records"] for client in values}, True)
            says.append(f"On records that owners held out, {name}: {over.says('{:.1%}'.format, 'records')}.")
    return says + without_comparison(stage, compared)
