"""The command line. It prints results to standard output, progress and errors to standard error."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedgrove import commands, heap
from fedgrove.deploy.flare.commands import COMMANDS
from fedgrove.errors import FedgroveError
from fedgrove.lazy import lazy
from fedgrove.options import AsJson, Deal, Measure, Quiet, Resume, Set, Threads, Tracker, Workers

if TYPE_CHECKING:
    from fedgrove import api, events, machine, progress
    from fedgrove import doctor as examination
    from fedgrove import export as exporting
    from fedgrove import split as dealing
    from fedgrove.api import Result
    from fedgrove.job import load as job_file
    from fedgrove.report import compare, reader, table
    from fedgrove.report import exports as export_report
    from fedgrove.report import page as run_page
    from fedgrove.report import plans as plan_report
    from fedgrove.report import split as split_report
    from fedgrove.rounds import capabilities
else:  # most of these import torch, which --help and a report must not wait for
    api, events, machine, progress = lazy("api"), lazy("events"), lazy("machine"), lazy("progress")
    examination, exporting, dealing, job_file = lazy("doctor"), lazy("export"), lazy("split"), lazy("job.load")
    compare, run_page, reader, table = (lazy(f"report.{name}") for name in ("compare", "page", "reader", "table"))
    export_report, plan_report, split_report = (lazy(f"report.{name}") for name in ("exports", "plans", "split"))
    capabilities = lazy("rounds.capabilities")

app = typer.Typer(
    name="fedgrove",
    help="Several owners of private text make one large language model smaller and better together.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fedgrove {version('fedgrove')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


def command(function: Callable[..., None], group: typer.Typer = app) -> Callable[..., None]:
    """Registers a command: prints a FedgroveError as one line (status 2); an interruption has status 130."""

    @group.command()
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except FedgroveError as error:
            _fail(str(error), 2)
        except UnicodeEncodeError as error:  # a file's name in letters that the locale of this terminal does not have
            if sys.getfilesystemencoding().lower() == "utf-8":
                raise
            _fail(f"the terminal's locale cannot write {ascii(error.object)[:100]}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8", 2)
        except KeyboardInterrupt:
            _fail("interrupted; a run continues with --resume", 130)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                _fail(
                    f"the disk is full ({error.filename or 'while writing'}); free some space, then continue with --resume", 2
                )
            if error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}", 2)

    return run


@command
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("fedgrove-demo"),
    resume: Resume = False,
    workers: Workers = 0,
    quiet: Quiet = False,
) -> None:
    """Four owners prune the shipped model together, then tune it: the whole job in two minutes, no network, no GPU.

    Example: fedgrove demo --out my-first-run
    """
    _show(api.run(str(files("fedgrove") / "demo" / "job.toml"), out, resume=resume, workers=workers, quiet=quiet))


@command
def init(folder: Annotated[Path, typer.Argument(metavar="[DIR]")] = Path()) -> None:
    """Writes a commented job file to edit.

    Example: fedgrove init my-job
    """
    file = folder / "job.toml"
    if folder.is_file():
        raise FedgroveError(f"{folder}: this is a file", "name a folder")
    if file.exists():
        raise FedgroveError(f"{file} exists already", "edit it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text((files("fedgrove") / "template.toml").read_text(encoding="utf-8"), encoding="utf-8")
    print(f"Wrote {file}. Edit it, then: fedgrove doctor {file}; fedgrove run {file}")


@command
def split(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A file, a folder, a saved data set or hub:OWNER/NAME.")],
    out: Annotated[Path, typer.Option(help="The folder to write: a file for each client, job.toml, split.html.")],
    by: Annotated[
        Deal, typer.Option(help="iid: evenly; dirichlet: uneven by --field; field: by value; size: uneven sizes.")
    ] = Deal.iid,
    clients: Annotated[int | None, typer.Option(help="How many; default with --by field: one per value.")] = None,
    field: Annotated[str | None, typer.Option(help="The field by which records are distributed.")] = None,
    alpha: Annotated[float, typer.Option(help="Of the Dirichlet distribution; smaller: clients differ more.")] = 0.3,
    text: Annotated[str | None, typer.Option(help="How a record becomes text: '{question} {answer}'.")] = None,
    held_out: Annotated[float, typer.Option("--heldout", help="The fraction of records held out for evaluation.")] = 0.1,
    held_out_each: Annotated[
        float, typer.Option("--heldout-each", help="The fraction held out of each client's own records.")
    ] = 0.0,
    seed: int = 0,
    model: Annotated[str, typer.Option(help="For the job file: a model directory or a hub id.")] = "path/to/model",
    quiet: Quiet = False,
) -> None:
    """Distributes one text over several clients, to simulate a federation; shows who holds what and writes a job file.

    Example: fedgrove split posts.jsonl --clients 8 --by dirichlet --alpha 0.3 --field label --out posts
    """
    with progress.display(quiet) as listener:
        listener.on_event(events.Phase("split", title=f"reading {source}"))
        if Path(model).is_dir():
            model = str(Path(model).resolve())
        split = dealing.split(
            source,
            out,
            by=by.value,
            clients=clients,
            field=field,
            alpha=alpha,
            text=text,
            held_out=held_out,
            held_out_each=held_out_each,
            seed=seed,
            model=model,
        )
    how = f"by {field}" if by is Deal.field else by.value if by is Deal.iid else f"{by.value}, alpha {alpha:g}"
    page = split_report.holdings_page(split.holdings, f"{source.name}: {how}, seed {seed}")
    (out / "split.html").write_text(page, encoding="utf-8")
    Console().print(split_report.holdings_table(split.holdings))
    for name in split.empty:
        print(f"{name} got no record and is left out; raise --alpha, or lower --clients")
    own = f" and {sum(split.held_out_each.values()):,} of the clients' own" if split.held_out_each else ""
    kept = f"{split.held_out:,} records{own} are held out; " if split.held_out or own else ""
    print(f"{kept}the job is {out / 'job.toml'}, the page is {out / 'split.html'}")


@command
def plan(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml")],
    set_: Set = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Shows what each client would do, send, and need in memory and time. Runs nothing.

    Example: fedgrove plan job.toml --set stages.0.samples=64
    """
    wanted = job_file.load(job, set_ or [])
    plans = api.plan(wanted, quiet=quiet)
    if as_json:
        print(json.dumps([plan.model_dump(mode="json") for plan in plans], indent=2))
        return
    console = Console()
    for plan, stage in zip(plans, wanted.stages, strict=True):
        console.print(plan_report.plan_table(plan.model_dump(mode="json"), stage.model_dump(mode="json")))
        for note in plan.notes:
            console.print(f"Note: {note}")
    console.print(
        "Memory is the peak in addition to the program itself (about 500 MiB). "
        f"Time is what a client of speed 1.0 ({capabilities.SPEED / 1e9:.0f} GFLOP/s) needs to compute and upload."
    )


@command
def doctor(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB.toml]")] = None,
    out: Annotated[Path | None, typer.Option(help="Where runs are written; default: runs.")] = None,
    listen: Annotated[
        list[int] | None, typer.Option(min=1, max=65535, help="A port on which a server would listen here.")
    ] = None,
    connect: Annotated[list[str] | None, typer.Option(help="HOST:PORT to which a client would connect.")] = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Checks this machine, and what a job needs: model, data, templates, memory. Runs nothing.

    Ends with status 2 if something has to be fixed. The first record of every file is shown as the model will see it.

    Example: fedgrove doctor job.toml
    """
    api.hush()
    folder = out or Path("runs")
    checks = machine.check_machine(folder, listen or (), connect or ())
    if job is not None:
        checks += examination.examine(job_file.load(job, set_ or []), folder)
    examination.show(checks, as_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(2)


@command
def run(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml")],
    out: Annotated[Path | None, typer.Option(help="The run folder; default: runs/NAME.")] = None,
    resume: Resume = False,
    set_: Set = None,
    workers: Workers = 0,
    threads: Threads = None,
    track: Annotated[list[Tracker] | None, typer.Option(help="Also log metrics there as they are measured.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Runs a job and writes the model to RUN/model.

    Example: fedgrove run job.toml --out runs/first --set stages.0.sparsity=0.6
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    trackers = [tracker.value for tracker in track or []]
    _show(api.run(job_file.load(job, set_ or []), out, resume=resume, workers=workers, quiet=quiet, track=trackers), as_json)


@command
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, a model directory or a hub id.")],
    data: Annotated[list[Path] | None, typer.Option(help="A held-out file, folder or data set; repeatable.")] = None,
    text: Annotated[str | None, typer.Option(help="How a record becomes text: '{question} {answer}'.")] = None,
    measure: Annotated[Measure, typer.Option(help="accuracy and generation need --prompt and --answer.")] = Measure.perplexity,
    prompt: Annotated[str | None, typer.Option(help="How a record becomes a prompt: '{question} '.")] = None,
    answer: Annotated[str | None, typer.Option(help="How a record becomes the correct answer: '{answer}'.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="A possible answer; default: all that occur.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window, or of a prompt with its label.")] = 512,
    records: Annotated[int | None, typer.Option(min=1, help="The most records, for answers and tasks.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens generated per record.")] = 64,
    speed: Annotated[bool, typer.Option("--speed", help="Speed, memory, bytes in plain transformers.")] = False,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-evaluation-harness; repeatable.")] = None,
    tasks_from: Annotated[Path | None, typer.Option(help="A folder with YAML files of more tasks.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measures a model: perplexity, accuracy, generation, speed, and tasks of lm-evaluation-harness.

    For perplexity the text is cut into consecutive windows of --length tokens that do not overlap (stride = length). Every
    token but the first of a window is predicted from those before it; perplexity is exp of the mean negative log-likelihood
    of all predicted tokens. Intervals are 95 % intervals, by bootstrap over windows or records.

    Example: fedgrove evaluate runs/first --data heldout.txt

    Example: fedgrove evaluate runs/first --data posts.jsonl --measure accuracy --prompt "{text} Topic:" --answer " {label}"
    """
    measured = api.evaluate(
        model, data or (), measure=measure.value, text=text, prompt=prompt, answer=answer, labels=label or (), length=length,
        records=records, tokens=tokens, speed=speed, tasks=task or (), tasks_from=tasks_from, quiet=quiet,
    )  # fmt: skip
    if as_json:
        print(json.dumps({"length": length, "texts": measured}, indent=2))
    else:
        print("\n".join(table.measured_lines(measured)))


@command
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, a model directory or a packed model.")],
    to: Annotated[str, typer.Option(help="hf, packed, shared, adapter, gguf, onnx, int8 or nf4.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; default: RUN/FORM.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Text to measure on; default: the run's held-out texts.")] = None,
    text: Annotated[str | None, typer.Option(help="How a record becomes text: '{question} {answer}'.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens per window of --data; default: 512.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="The most windows of each text.")] = None,
    measure: Annotated[bool, typer.Option(help="Reload what was written and measure its perplexity.")] = True,
    quiet: Quiet = False,
) -> None:
    """Writes the result in another format, reloads it, and measures its bytes and perplexity.

    **hf**: a plain model directory (also from a packed model). **packed**: the fewest bytes, lossless. **shared**: tensors
    that blocks share are stored once. **adapter**: for peft, if nothing was pruned. **gguf**: for llama.cpp. **onnx**: a
    graph in float32. **int8**, **nf4**: 8 and 4 bits by bitsandbytes, for transformers.

    The measurements are also in OUT.export.json, and in the run's report when it is written again.

    Example: fedgrove export runs/first --to packed
    """
    if not source.is_dir():
        raise FedgroveError(f"{source}: no such folder")
    for option, value in (("--text", text), ("--length", length)):
        if value is not None and not data:
            raise FedgroveError(f"{option}: it belongs to --data; a run's own texts are measured as in the run", "leave it out")
    if data and not measure:
        raise FedgroveError("--no-measure: nothing would be measured on --data", "leave one of them out")
    api.hush()
    texts = None
    if data:
        texts = exporting.Texts(tuple((str(file), file, text) for file in data), length or 512, windows)
    elif not measure:
        texts = exporting.Texts()
    elif windows:
        texts = replace(exporting.held_out(exporting.find_source(source)), windows=windows, known=())
    with progress.display(quiet) as listener:
        written = exporting.export(source, to, out, texts, listener)
    Console().print(export_report.export_table(reader.read_exports(written.parent)))
    print(f"Wrote {written} ({exporting.folder_bytes(written) / 1e6:.1f} MB) and {written.name}.export.json next to it")


@command
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run folder, or several to compare.")],
    out: Annotated[Path | None, typer.Option(help="The page that compares several runs; default: compare.html.")] = None,
) -> None:
    """Writes RUN/report.html again, from the run folder alone; for several runs, one page that compares them.

    Example: fedgrove report runs/first runs/second --out compare.html
    """
    if len(runs) == 1:
        if out is not None:
            raise FedgroveError("--out: the page of one run is RUN/report.html", "leave it out, or name several runs")
        print(f"Wrote {run_page.write_report(runs[0])}")
        return

    out = out or Path("compare.html")
    Console().print(compare.comparison_table(compare.write_comparison(runs, out)))
    print(f"Wrote {out}")


for _command in commands.COMMANDS:
    command(_command)
federation = typer.Typer(
    name="federation", help="Between organisations, on NVIDIA FLARE.", no_args_is_help=True, rich_markup_mode="markdown"
)
for _function in COMMANDS:
    command(_function, federation)
app.add_typer(federation)


def main() -> None:
    """The entry point of the ``fedgrove`` command."""
    # Set before torch is imported: OpenMP threads that spin while they wait make a busy machine four times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    heap.keep_large_apart()
    os.environ.setdefault("TQDM_DISABLE", "1")  # set before tqdm is imported: libraries show no bars inside of ours
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows a ? for what it cannot write
    app()


def _show(result: Result, as_json: bool = False) -> None:

    out, summary = result.path, result.summary
    if as_json:
        print(json.dumps({"run": str(out), "sparsity": summary.sparsity, "perplexity": summary.perplexities()}, indent=2))
        return
    console = Console()
    console.print(table.result_table(summary))
    console.print(f"The model is in {out / 'model'}, the report is {out / 'report.html'}.", soft_wrap=True)


def _fail(message: str, status: int) -> None:
    print(f"fedgrove: {' '.join(message.split())}", file=sys.stderr)
    sys.stdout.flush()
    if status == 130:
        os._exit(status)  # a normal exit would wait for threads of libraries
    raise typer.Exit(status)
