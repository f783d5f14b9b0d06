"""Commands that use what runs have made. The modules that do the work are imported when they are first used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedgrove.lazy import lazy
from fedgrove.options import AsJson, By, Quiet

if TYPE_CHECKING:
    from fedgrove import adopt as adopting
    from fedgrove import api, progress
    from fedgrove import route as routes
    from fedgrove.report import routing as route_report
else:
    adopting, api, progress, routes = (lazy(name) for name in ("adopt", "api", "progress", "route"))
    route_report = lazy("report.routing")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with a pool.")]
Data = Annotated[list[Path], typer.Option(help="The owner's text; repeatable.")]
Text = Annotated[str | None, typer.Option(help="How a record becomes text: '{question} {answer}'.")]
Model = Annotated[str | None, typer.Option(help="The model that the pool was trained on; default: that of the job.")]


def adopt(
    run: Run,
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder of the adapter.")],
    by: Annotated[
        By | None,
        typer.Option(help="gate: the gate's weights, the default if it looks at single windows; losses: the best member."),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="The owner's group, if the gate is groups; a client of the run, if it is user_centric.")
    ] = None,
    text: Text = None,
    prompt: Annotated[str | None, typer.Option(help="How a record becomes a prompt: '{question} '.")] = None,
    answer: Annotated[str | None, typer.Option(help="How a record becomes the answer: '{answer}'.")] = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Gives an owner who was not in the run one adapter of its pool: no training, nothing is sent.

    At most 32 windows of the owner's text are used. The model without an adapter and the shared one are always candidates; half
    of the windows choose, and losses are those on the other half.

    Example: fedgrove adopt runs/first --data new.jsonl --out mine
    """
    api.hush()
    found = adopting.adopt(
        run, data, out, by=by, group=group, model=model, text=text, prompt=prompt, answer=answer
    )  # fmt: skip
    if as_json:
        print(json.dumps({**vars(found), "out": None if found.out is None else str(found.out)}, indent=2))
        return
    table = Table("candidate", "loss", title="Nats per token, on windows that nothing was chosen by")
    for name, loss in found.losses.items():
        table.add_row(f"{name} (chosen)" if name == found.choice else name, f"{loss:.4f}")
    Console().print(table)
    if found.unlike is not None:
        print(f"{found.unlike:.0%} of {found.windows} windows are like nothing that any owner has (5 % expected)")
    if found.out is None:
        print("Nothing in the pool fits this text better than the model without an adapter: none was written")
    else:
        weights = ", ".join(f"{weight:.2f}" for weight in found.weights)
        print(f"Wrote {found.out}: weights {weights} over the members")
    print(f"It took {found.seconds:.1f} s and {found.forwards} forward passes of a window")


def gate(
    run: Run,
    data: Annotated[Path, typer.Option(help="Texts: each record is one.")],
    text: Text = None,
    model: Model = None,
    most: Annotated[int | None, typer.Option(min=1, help="Only the first texts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Shows how much of each member of a pool texts get, and how unusual they are for the federation.

    p is the fraction of the federation's text that is as unusual as this one or more. Of text like theirs, 5 % has p < 0.05.

    Example: fedgrove gate runs/first --data texts.jsonl
    """
    api.hush()
    found = adopting.look(run, data, text=text, model=model, most=most)
    p_values = [None] * len(found.texts) if found.p is None else found.p.tolist()
    rows = list(zip(found.texts, found.weights.tolist(), p_values, strict=True))
    if as_json:
        print(json.dumps([{"weights": weights, "p": p} for _, weights, p in rows], indent=2))
        return
    table = Table("text", *[f"member {member}" for member in range(found.weights.shape[1])], "p")
    for words, weights, p in rows:
        table.add_row(" ".join(words.split())[:40], *[f"{w:.2f}" for w in weights], "" if p is None else f"{p:.3f}")
    Console().print(table)
    if found.p is None:
        print("No p: the gate was fitted with noise, and no text was counted besides")


def route(
    small: Annotated[str, typer.Argument(metavar="SMALL", help="A run folder, a model directory or a hub id.")],
    large: Annotated[str, typer.Argument(metavar="LARGE", help="The same, of the model for hard questions.")],
    data: Annotated[list[Path], typer.Option(help="Records that may be escalated; repeatable.")],
    prompt: Annotated[str, typer.Option(help="How a record becomes a prompt: '{question} '.")],
    answer: Annotated[str, typer.Option(help="How a record becomes the correct answer: '{answer}'.")],
    private: Annotated[list[Path] | None, typer.Option(help="Records that never go to LARGE; repeatable.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="A possible answer; default: all that occur.")] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="A fraction of all records to escalate; repeatable.", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a prompt with its label.")] = 512,
    records: Annotated[int | None, typer.Option(min=1, help="The most records of each file.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measures what it is worth to leave the questions that a small model is least sure of to a large one.

    Confidence is the probability of the chosen label among all labels. Records of --private count in every number, but only the
    small model answers them. Nothing is sent anywhere: both models run here, one after the other.

    Example: fedgrove route runs/small/model path/to/large --data posts.jsonl --prompt "{text} Topic:" --answer " {label}"
    """
    api.hush()
    with progress.display(quiet) as listener:
        found = routes.route(
            small, large, data, prompt=prompt, answer=answer, private=private or (), labels=label or (),
            shares=share or (), length=length, records=records, listener=listener,
        )  # fmt: skip
    if as_json:
        print(json.dumps(route_report.plain(found), indent=2))
        return
    Console().print(route_report.routing_table(found))
    print("\n".join(route_report.verdict(found)))


COMMANDS = (adopt, gate, route)
