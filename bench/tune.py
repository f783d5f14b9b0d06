"""Eight unequal clients tune one model: FedPipe beside the best uniform LoRA of a grid, and other baselines.

    .venv/bin/python bench/tune.py --data ../shared/data --tasks newsgroups --write
    .venv/bin/python bench/tune.py --data ../shared/data --tasks medquad --methods fedpipe uniform --settings 3 --seeds 0
        --model SMOLLM2 --clients 4 --rate 2e-3 --page tune-smollm2 --write

A task's training text is distributed over eight clients, or four, by label (Dirichlet 0.3). Memory goes from 1 to 8 times what
the weakest has, speed from 1 to 6, in another order. The weakest can just hold rank 16 in every linear, one window at a time.
Time is modeled from the clients' capabilities; bytes are those of the ledger, in both directions.

Uniform LoRA runs with every setting of ``GRID``, each for about 17 modeled seconds, twice as long as FedPipe. The planner does
not search the grid itself: a setting's loss is known after a run with it. The best setting is the one whose lowest loss is
lowest on the same text and seed; FedPipe is given none of this. ``--without`` leaves out one part of FedPipe, and ``--alike``
gives all clients the memory and speed of one in the middle.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import page
import results
import torch
from arguments import existing_folder

from fedgrove import api
from fedgrove.files import read_lines
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import measure_cost
from fedgrove.models.stream import Checkpoint
from fedgrove.report.paired import difference_interval
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.cost import ClientConfig, SearchSpace, memory
from fedgrove.stages.tune.objective import GAINED, NOISE, PREDICTED, Gradients

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "src" / "fedgrove" / "demo" / "grove-6m"
CLIENTS, ALPHA = 8, 0.3
SPEEDS = [1.0, 3.1, 5.3, 2.4, 6.0, 1.7, 4.6, 3.9]  # of the clients in the order of their memory
CARDS = {8: range(8), 4: (0, 2, 4, 7)}  # by the number of clients, which of these memories and speeds they have
LENGTH, WINDOWS = 64, 40
RANKS, BATCHES = [2, 4, 8, 16], [1, 2, 4, 8, 16]
BITS = 32  # where processors have no arithmetic in 16 bits, 32 are three times as fast; losses are the same
# Rounds are of different lengths: the table compares times.
ROUNDS = {"fedpipe": 4, "full": 4, "alone": 4, "central": 4}
STEPS = {"fedpipe": 30, "full": 4, "alone": 4, "central": 4}
RATES = {"fedpipe": 4e-3, "full": 5e-4, "alone": 2e-3, "central": 2e-3}
GRID = [  # windows of a step, steps of a round, rank, schedule of the learning rate, rounds
    (4, 16, 16, "none", 4), (4, 16, 16, "linear", 4), (1, 48, 8, "none", 6), (1, 48, 8, "linear", 6), (1, 16, 8, "none", 12),
]  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {  # what is left out of FedPipe, by keys of the job
    "steps": {"max_steps": 0},
    "batches": {"batches": [1]},
    "schedule": {"lr_schedule": "none"},
    "ranks": {"ranks": [8]},
}
RESULT = ("points", "gains", "windows", "rank")
UPLINK = "10Mbit"
TEXTS = {"newsgroups": "{text}", "medquad": "{question}\n{answer}", "e2e": "{mr}\n{ref}"}


WORTH = Gradients.worth  # which "guessed" takes the place of


def guessed(_: Gradients, importance: Mapping[str, float], ranks: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """What linears are worth if nobody has measured them: all the same, and a rank what is guessed before the first round."""
    return WORTH(Gradients(), dict.fromkeys(importance, 1 / len(importance)), ranks)


# Likewise, what the clients measure and the planner then does not know: of Gradients, what it has instead.
UNKNOWN: dict[str, tuple[str, Any]] = {"noise": ("noise", NOISE), "importance": ("worth", guessed)}


def label(task: str, record: dict[str, Any]) -> str:
    """What clients differ in: topic, type of question, or kind of food (E2E names it in most records)."""
    if task == "e2e":
        found = re.search(r"food\[(.*?)\]", record["mr"])
        return found[1] if found else "none"
    return str(record["label" if task == "newsgroups" else "type"])


def held_out(task: str, data: Path, folder: Path, validate: bool) -> tuple[list[str], Path]:
    """The lines to distribute, and the file to measure on: the test split, or a part of the training text to choose settings.

    That part is a tenth of the records; in E2E everything about four of the twenty restaurants: the test split, too, is about
    other restaurants. Only the beginning is measured, so lines are shuffled: splits are sorted by newsgroup or restaurant.
    """
    lines = (data / task / "train.jsonl").read_text(encoding="utf-8").splitlines()
    if validate:
        random.Random("validation").shuffle(lines)
        lines, held = lines[len(lines) // 10 :], lines[: len(lines) // 10]
        if task == "e2e":
            of = {line: json.loads(line)["mr"].split(",")[0] for line in (*held, *lines)}
            others = set(list(dict.fromkeys(of.values()))[:4])
            held, lines = [line for line in of if of[line] in others], [line for line in of if of[line] not in others]
    else:
        held = (data / task / "test.jsonl").read_text(encoding="utf-8").splitlines()
        random.Random("test").shuffle(held)
    file = folder / "held-out.jsonl"
    file.write_text("\n".join(held) + "\n", encoding="utf-8")
    return lines, file


def deal(task: str, lines: list[str], folder: Path, seed: int, clients: int = CLIENTS) -> list[Path]:
    """Writes each client's file: every label is distributed by its own proportions, drawn from Dirichlet(0.3)."""
    by_label: dict[str, list[str]] = {}
    for line in lines:
        by_label.setdefault(label(task, json.loads(line)), []).append(line)
    rng = np.random.default_rng(seed)
    dealt: list[list[str]] = [[] for _ in range(clients)]
    for name in sorted(by_label):
        lines = by_label[name]
        random.Random(f"{seed}/{name}").shuffle(lines)
        cuts = (np.cumsum(rng.dirichlet([ALPHA] * clients))[:-1] * len(lines)).astype(int)
        for part, (start, end) in zip(dealt, itertools.pairwise([0, *cuts, len(lines)]), strict=True):
            part += lines[start:end]
    files = []
    for i, part in enumerate(dealt):
        random.Random(f"{seed}/{i}").shuffle(part)
        files.append(folder / f"client-{i}.jsonl")
        files[-1].write_text("\n".join(part or dealt[0][:8]) + "\n", encoding="utf-8")
    return files


def weakest_memory(model: Path) -> int:
    """Bytes that just hold rank 16 in every linear, one window at a time."""
    cost = measure_cost(Decoder(Checkpoint(model)), LENGTH, masked=False)
    config = ClientConfig(BITS, BATCHES[-1], 1, dict.fromkeys(cost.linears, RANKS[-1]))
    space = SearchSpace((BITS,), tuple(BATCHES), tuple(RANKS), 1, RANKS[-1])
    return math.ceil(memory(cost, space, config))


def job(
    task: str,
    method: str,
    files: list[list[Path]],
    first: int,
    held: Path,
    seed: int,
    alike: bool = False,
    model: Path = MODEL,
    clients: int = CLIENTS,
    **stage: Any,
) -> Job:
    """A job of one method.

    Args:
        files: by client.
        first: the number of the first client.
        alike: whether all clients have the memory and speed of one in the middle.
        model: the folder of the model.
        clients: the number of clients of the federation.
        stage: keys of the stage.
    """
    least = weakest_memory(model)
    links = {"uplink": UPLINK, "downlink": UPLINK}
    cards = [CARDS[clients][clients // 2 if alike else i] for i in range(clients)]
    limited = [{"memory": least * (card + 1), "speed": SPEEDS[card], **links} for card in cards]
    unlimited = [{"speed": speed, **links} for speed in SPEEDS]  # no client has the memory that full fine-tuning needs
    given = unlimited if method == "full" or len(files) == 1 else limited
    kind = method if method in ("fedpipe", "full") else "lora"
    batches = BATCHES if kind == "fedpipe" else [BATCHES[-1] * clients if method == "central" else BATCHES[-1]]
    return Job.model_validate({
        "name": "bench",
        "seed": seed,
        "model": {"path": str(model)},
        "clients": [
            {"name": f"client-{first + i}", "data": paths, "text": TEXTS[task], **given[first + i]}
            for i, paths in enumerate(files)
        ],
        "stages": [{
            "kind": "tune", "method": kind, "length": LENGTH, "ranks": RANKS, "batches": batches, "bits": [BITS, 4],
            "eval_every": 1, **stage,
        }],
        "evaluate": {"data": [{"name": task, "path": held, "text": TEXTS[task]}], "length": 256,
                     "windows": WINDOWS},
    })  # fmt: skip


def curve(wanted: Job, folder: Path) -> dict[str, Any]:
    """Runs a job.

    Returns:
        ``points``: after every round, modeled seconds, bytes so far, held-out loss in nats per token. ``gains``: of rounds
        whose gain was predicted, the prediction and the outcome. ``windows``: of the last model, loss and tokens of every
        held-out window. ``steps``, ``rank``: the plan's, by client; the rank is the mean over all linears.
    """
    run = api.run(wanted, folder / "run", quiet=True)
    metrics, ledger = read_lines(run.path / "metrics.jsonl"), read_lines(run.path / "ledger.jsonl")
    points = []
    (stage,) = wanted.stages
    assert isinstance(stage, Config)
    for round_ in range(stage.rounds):
        at = {line["name"].split("/")[0]: line["value"] for line in metrics if line["round"] == round_ and not line["client"]}
        sent = sum(line["bytes"] for line in ledger if line["round"] <= round_ and line["kind"] != "rounds/capabilities")
        points.append((at["clock"], sent, math.log(at["perplexity"])))
    measured = {(line["round"], line["name"]): line["value"] for line in metrics}
    rounds = [round_ for round_ in range(stage.rounds) if (round_, PREDICTED) in measured]
    gains = [(measured[round_, PREDICTED], measured[round_, GAINED]) for round_ in rounds]
    (windows,) = (line["parts"] for line in read_lines(run.path / "examples.jsonl") if line["stage"] == 0)
    plan = json.loads((run.path / "plan-0-tune.json").read_text(encoding="utf-8"))
    steps = {name: one["steps"] for name, one in plan["clients"].items()}
    rank = {name: round(sum(one["ranks"].values()) / len(plan["importance"]), 2) for name, one in plan["clients"].items()}
    return {"points": points, "gains": gains, "windows": windows, "steps": steps, "rank": rank}


def run_method(
    data: Path,
    model: Path,
    task: str,
    method: str,
    seed: int,
    validate: bool,
    alike: bool = False,
    without: str = "",
    clients: int = CLIENTS,
    **stage: Any,
) -> dict[str, Any]:
    """The curve of a method; stand-alone: the mean over its clients.

    Args:
        without: the part of FedPipe that is left out; empty: none.
        clients: their number.
        stage: keys of the stage.
    """
    stage |= PARTS.get(without, {})
    name, value = UNKNOWN.get(without, ("noise", Gradients.noise))
    with mock.patch.object(Gradients, name, value), tempfile.TemporaryDirectory() as folder:
        lines, test = held_out(task, data, Path(folder), validate)
        files = deal(task, lines, Path(folder), seed, clients)
        same: dict[str, Any] = {"alike": alike, "model": model, "clients": clients, **stage}
        if method == "alone":
            curves = []
            for i, file in enumerate(files):
                (Path(folder) / f"{i}").mkdir()
                of_client = job(task, method, [[file]], i, test, seed, **same)
                curves.append(curve(of_client, Path(folder) / f"{i}")["points"])
            points = [tuple(map(statistics.mean, zip(*at, strict=True))) for at in zip(*curves, strict=True)]
            return {"points": points, "gains": [], "windows": []}
        by_client = [files] if method == "central" else [[file] for file in files]
        first = clients // 2 if method == "central" else 0
        return curve(job(task, method, by_client, first, test, seed, **same), Path(folder))


def settings_of(method: str, keys: dict[str, Any], settings: list[int], rate: float = RATES["fedpipe"]) -> list[dict[str, Any]]:
    """The keys of the stage with which a method runs.

    Args:
        keys: of FedPipe, in place of those that it has otherwise.
        settings: of uniform LoRA, the places in the grid.
        rate: the learning rate of FedPipe and uniform LoRA.
    """
    if method != "uniform":
        rates = {**RATES, "fedpipe": rate}
        usual = {"rounds": ROUNDS[method], "steps": STEPS[method], "learning_rate": rates[method]}
        return [{**usual, "lr_schedule": "linear", **keys} if method == "fedpipe" else {**usual, "lr_schedule": "none"}]
    names = ("batches", "steps", "ranks", "lr_schedule", "rounds")
    return [
        {**dict(zip(names, ([batch], steps, [rank], *others), strict=True)), "learning_rate": rate}
        for batch, steps, rank, *others in (GRID[place] for place in settings)
    ]


def named(settings: dict[str, Any]) -> str:
    """The method in words."""
    method = str(settings["method"])
    if method == "fedpipe":
        (usual,) = settings_of(method, {}, [])
        of_run = ("task", "method", "seed", "validate", "alike", "without", "clients", "learning_rate", *RESULT)
        changed = {key: value for key, value in settings.items() if key not in of_run and usual.get(key) != value}
        left_out = f", without {settings['without']}" if settings["without"] else ""
        return f"FedPipe{left_out}" + "".join(f", {key} {value}" for key, value in changed.items())
    if method == "uniform":
        falls = ", falling rate" if settings["lr_schedule"] == "linear" else ""
        return f"uniform, {settings['steps']} steps of {settings['batches'][0]}, rank {settings['ranks'][0]}{falls}"
    return {"full": "full fine-tuning", "alone": "stand-alone (mean)", "central": "centralized"}[method]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: for each task and setting the mean over seeds, and FedPipe beside the best uniform LoRA of the same seed."""
    rows = [
        "| task | method | loss at the end | time | MB | to the best uniform's lowest loss: time, bytes "
        "| its end minus that of the best uniform (95 %) | predictions off by, median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(result["task"] for result in found):
        of_task = [result for result in found if result["task"] == task]
        best: dict[int, dict[str, Any]] = {}
        for result in of_task:
            seed = result["seed"]
            if result["method"] == "uniform" and (seed not in best or lowest(result)[2] < lowest(best[seed])[2]):
                best[seed] = result
        for name in dict.fromkeys(map(named, of_task)):
            runs = [result for result in of_task if named(result) == name]
            seconds, sent, ends = zip(*(run["points"][-1] for run in runs), strict=True)
            end = f"{statistics.mean(ends):.3f} ({', '.join(f'{end:.3f}' for end in ends)})"
            costs = f"{statistics.mean(seconds):.1f} s | {statistics.mean(sent) / 1e6:.1f}"
            compared = [run for run in runs if run["method"] == "fedpipe" and run["seed"] in best]
            beside = "; ".join(difference(run, best[run["seed"]]) for run in compared)
            offs = [abs(predicted / gained - 1) for run in runs for predicted, gained in run["gains"] if gained]
            off = f"{statistics.median(offs):.0%}" if offs else ""
            rows.append(f"| {task} | {name} | {end} | {costs} | {reached(compared, best)} | {beside} | {off} |")
    return "\n".join(rows)


def lowest(run: dict[str, Any]) -> list[float]:
    """The point of a run at which its loss is lowest."""
    return min(run["points"], key=lambda point: float(point[2]))


def difference(run: dict[str, Any], other: dict[str, Any]) -> str:
    """The last loss of a run minus that of another one, with the interval over windows: the paired bootstrap."""
    between = difference_interval({"": run["windows"]}, {"": other["windows"]}, "")
    interval = f" ({between[0]:+.3f} to {between[1]:+.3f})" if between else ""
    return f"{run['points'][-1][2] - other['points'][-1][2]:+.3f}{interval}"


def reached(runs: list[dict[str, Any]], best: dict[int, dict[str, Any]]) -> str:
    """For each run: when it reached the lowest loss of its seed's best, as fractions of the time and bytes of that one."""
    cells = []
    for run in runs:
        mark = lowest(best[run["seed"]])
        at = next((point for point in run["points"] if point[2] <= mark[2]), None)
        cells.append(f"{at[0] / mark[0]:.2f}×, {at[1] / mark[1]:.2f}×" if at else "never")
    return "; ".join(cells)


def main() -> None:
    """Runs the methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with newsgroups, medquad and e2e")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TEXTS), default=sorted(TEXTS))
    parser.add_argument("--methods", nargs="+", default=[*ROUNDS, "uniform"], choices=[*ROUNDS, "uniform"])
    parser.add_argument(
        "--without", nargs="+", default=[""], choices=["", *PARTS, *UNKNOWN], help="parts of FedPipe to leave out, one a run"
    )
    parser.add_argument("--keys", type=json.loads, default={}, help="keys of FedPipe's stage, as JSON: to choose settings by")
    parser.add_argument(
        "--settings", nargs="+", type=int, default=[*range(len(GRID))], choices=range(len(GRID)), help="places in the grid"
    )
    parser.add_argument("--rate", type=float, default=RATES["fedpipe"], help="the learning rate of FedPipe and uniform LoRA")
    parser.add_argument("--model", type=existing_folder, default=MODEL, help="a folder; the shipped model if left out")
    parser.add_argument("--clients", type=int, choices=CARDS, default=CLIENTS)
    parser.add_argument("--alike", action="store_true", help="all clients have the same memory and speed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the table of what the file of results holds")
    parser.add_argument("--validate", action="store_true", help="choose settings by a tenth of the training text, not the test")
    parser.add_argument("--page", help="the name of the place in docs/benchmarks.md", default="tune")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    args = parser.parse_args()
    api.hush()
    torch.set_num_threads(1)
    wanted = [
        {
            "task": task,
            "method": method,
            "seed": seed,
            "validate": args.validate,
            "alike": args.alike,
            "without": without,
            **({"clients": args.clients} if args.clients != CLIENTS else {}),
            **stage,
        }
        for task, seed, method in itertools.product(args.tasks, args.seeds, args.methods)
        for without in (args.without if method == "fedpipe" else [""])
        for stage in settings_of(method, args.keys, args.settings, args.rate)
    ]
    kept = results.Kept(args.results, args.model, only=args.kept)
    measured = [
        (settings, kept(functools.partial(run_method, args.data, args.model, **settings), **settings)) for settings in wanted
    ]
    text = table([{**result, **settings} for settings, result in measured if result])  # steps are in both
    print(text)
    if args.write:
        page.write(args.page, text)


if __name__ == "__main__":
    main()
