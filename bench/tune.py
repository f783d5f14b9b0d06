"""Eight unequal clients tune one model: FedPipe beside uniform LoRA, full fine-tuning, stand-alone and centralized.

    .venv/bin/python bench/tune.py --data ../shared/data --tasks newsgroups --write

A task's training text is distributed over eight clients by label (Dirichlet 0.3). Memory goes from 1 to 8 times what the
weakest has, speed from 1 to 6, in another order. The weakest can just hold rank 16 in every linear, one window at a time, in 16
bits: so that is what uniform LoRA gives to all, with the product's largest batch, and once more with a quarter of that in four
times the steps. Time is modeled from the clients' capabilities; bytes are those of the ledger, in both directions.
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
from pathlib import Path
from typing import Any

import numpy as np
import page
import results
import torch
from transformers.utils import logging

from fedgrove import api
from fedgrove.files import read_lines
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import measure_cost
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.cost import ClientConfig, SearchSpace, memory

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "src" / "fedgrove" / "demo" / "grove-6m"
CLIENTS, ALPHA = 8, 0.3
SPEEDS = [1.0, 3.1, 5.3, 2.4, 6.0, 1.7, 4.6, 3.9]  # of the clients in the order of their memory
LENGTH, WINDOWS = 64, 12
RANKS, BATCHES = [2, 4, 8, 16], [1, 2, 4, 8, 16]
BITS = 32  # where processors have no arithmetic in 16 bits, 32 are three times as fast; losses are the same
# Rounds are of different lengths: the table compares times.
STEPS = {"fedpipe": 16, "lora": 4, "lora-quarter": 16, "full": 4, "alone": 4, "central": 4}
ROUNDS = {"fedpipe": 12, "lora": 4, "lora-quarter": 4, "full": 4, "alone": 4, "central": 4}
RATES = {"fedpipe": 4e-3, "lora": 4e-3, "lora-quarter": 4e-3, "full": 5e-4, "alone": 2e-3, "central": 2e-3}
UPLINK = "10Mbit"
TEXTS = {"newsgroups": "{text}", "medquad": "{question}\n{answer}", "e2e": "{mr}\n{ref}"}


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


def deal(task: str, lines: list[str], folder: Path, seed: int) -> list[Path]:
    """Writes each client's file: every label is distributed by its own proportions, drawn from Dirichlet(0.3)."""
    by_label: dict[str, list[str]] = {}
    for line in lines:
        by_label.setdefault(label(task, json.loads(line)), []).append(line)
    rng = np.random.default_rng(seed)
    dealt: list[list[str]] = [[] for _ in range(CLIENTS)]
    for name in sorted(by_label):
        lines = by_label[name]
        random.Random(f"{seed}/{name}").shuffle(lines)
        cuts = (np.cumsum(rng.dirichlet([ALPHA] * CLIENTS))[:-1] * len(lines)).astype(int)
        for part, (start, end) in zip(dealt, itertools.pairwise([0, *cuts, len(lines)]), strict=True):
            part += lines[start:end]
    files = []
    for i, part in enumerate(dealt):
        random.Random(f"{seed}/{i}").shuffle(part)
        files.append(folder / f"client-{i}.jsonl")
        files[-1].write_text("\n".join(part or dealt[0][:8]) + "\n", encoding="utf-8")
    return files


def weakest_memory() -> int:
    """Bytes that just hold rank 16 in every linear in 16 bits, one window at a time."""
    cost = measure_cost(Decoder(Checkpoint(MODEL)), LENGTH, masked=False)
    config = ClientConfig(BITS, BATCHES[-1], 1, dict.fromkeys(cost.linears, RANKS[-1]))
    space = SearchSpace((BITS,), tuple(BATCHES), tuple(RANKS), 1, RANKS[-1])
    return math.ceil(memory(cost, space, config))


def job(
    task: str, method: str, files: list[list[Path]], first: int, held: Path, seed: int, rounds: int, steps: int, rate: float
) -> Job:
    """A job of one method; ``files`` by client; ``first``: the number of the first client."""
    least = weakest_memory()
    links = {"uplink": UPLINK, "downlink": UPLINK}
    limited = [{"memory": least * (i + 1), "speed": SPEEDS[i], **links} for i in range(CLIENTS)]
    unlimited = [{"speed": speed, **links} for speed in SPEEDS]  # no client has the memory that full fine-tuning needs
    given = unlimited if method == "full" or len(files) == 1 else limited
    kind = method if method in ("fedpipe", "full") else "lora"
    batch = BATCHES[-1] * CLIENTS if method == "central" else BATCHES[-1] // 4 if method == "lora-quarter" else BATCHES[-1]
    return Job.model_validate({
        "name": "bench",
        "seed": seed,
        "model": {"path": str(MODEL)},
        "clients": [
            {"name": f"client-{first + i}", "data": paths, "text": TEXTS[task], **given[first + i]}
            for i, paths in enumerate(files)
        ],
        "stages": [{
            "kind": "tune", "method": kind, "rounds": rounds, "steps": steps, "length": LENGTH, "ranks": RANKS,
            "batches": BATCHES if kind == "fedpipe" else [batch],
            "bits": [BITS, 4], "learning_rate": rate, "eval_every": 1,
        }],
        "evaluate": {"data": [{"name": task, "path": held, "text": TEXTS[task]}], "length": 256,
                     "windows": WINDOWS},
    })  # fmt: skip


def curve(wanted: Job, folder: Path) -> list[tuple[float, float, float]]:
    """Runs a job; after every round: modeled seconds, bytes so far, held-out loss in nats per token."""
    run = api.run(wanted, folder / "run", quiet=True)
    metrics, ledger = read_lines(run.path / "metrics.jsonl"), read_lines(run.path / "ledger.jsonl")
    points = []
    (stage,) = wanted.stages
    assert isinstance(stage, Config)
    for round_ in range(stage.rounds):
        at = {line["name"].split("/")[0]: line["value"] for line in metrics if line["round"] == round_ and not line["client"]}
        sent = sum(line["bytes"] for line in ledger if line["round"] <= round_ and line["kind"] != "rounds/capabilities")
        points.append((at["clock"], sent, math.log(at["perplexity"])))
    return points


def run_method(
    data: Path, task: str, method: str, seed: int, rounds: int, steps: int, rate: float, validate: bool
) -> dict[str, Any]:
    """The curve of a method; stand-alone: the mean over its clients."""
    with tempfile.TemporaryDirectory() as folder:
        lines, test = held_out(task, data, Path(folder), validate)
        files = deal(task, lines, Path(folder), seed)
        if method == "alone":
            curves = []
            for i, file in enumerate(files):
                (Path(folder) / f"{i}").mkdir()
                curves.append(curve(job(task, method, [[file]], i, test, seed, rounds, steps, rate), Path(folder) / f"{i}"))
            points = [tuple(map(statistics.mean, zip(*at, strict=True))) for at in zip(*curves, strict=True)]
        else:
            clients = [files] if method == "central" else [[file] for file in files]
            first = CLIENTS // 2 if method == "central" else 0
            points = curve(job(task, method, clients, first, test, seed, rounds, steps, rate), Path(folder))
    return {"points": points}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: for each task and method the mean over seeds, each seed in brackets."""
    names = {"fedpipe": "FedPipe", "lora": "uniform LoRA", "lora-quarter": "uniform LoRA, 16 small steps",
             "full": "full fine-tuning", "alone": "stand-alone (mean)", "central": "centralized"}  # fmt: skip
    rows = [
        "| task | method | rounds | loss at the end | time | MB | to uniform's best: time, bytes | to the small steps' best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(result["task"] for result in found):
        of_task = [result for result in found if result["task"] == task]
        for method, name in names.items():
            runs = [result for result in of_task if result["method"] == method]
            if not runs:
                continue
            seconds, sent, ends = zip(*(run["points"][-1] for run in runs), strict=True)
            marks = [
                reached(runs, {one["seed"]: one["points"] for one in of_task if one["method"] == mark})
                for mark in ("lora", "lora-quarter")
                if method == "fedpipe"
            ] or ["", ""]
            end = f"{statistics.mean(ends):.3f} ({', '.join(f'{end:.3f}' for end in ends)})"
            costs = f"{statistics.mean(seconds):.1f} s | {statistics.mean(sent) / 1e6:.1f}"
            rows.append(f"| {task} | {name} | {runs[0]['rounds']} | {end} | {costs} | {' | '.join(marks)} |")
    return "\n".join(rows)


def reached(runs: list[dict[str, Any]], others: dict[int, list[list[float]]]) -> str:
    """For each seed: when the other run's lowest loss was reached, as fractions of the time and bytes that the other needed."""
    cells = []
    for run in runs:
        best = min(others[run["seed"]], key=lambda point: point[2])
        at = next((point for point in run["points"] if point[2] <= best[2]), None)
        cells.append(f"{at[0] / best[0]:.2f}×, {at[1] / best[1]:.2f}×" if at else "never")
    return "; ".join(cells)


def main() -> None:
    """Runs the methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with newsgroups, medquad and e2e")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TEXTS), default=sorted(TEXTS))
    parser.add_argument("--methods", nargs="+", default=list(ROUNDS), choices=list(ROUNDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to try; default: that of each method")
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the table of what the file of results holds")
    parser.add_argument("--validate", action="store_true", help="choose settings by a tenth of the training text, not the test")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted = [
        {"task": task, "method": method, "seed": seed, "rounds": ROUNDS[method], "steps": STEPS[method], "rate": rate,
         "validate": args.validate}
        for task, seed, method in itertools.product(args.tasks, args.seeds, args.methods)
        for rate in args.rates or [RATES[method]]
    ]  # fmt: skip
    kept = results.Kept(args.results, MODEL, only=args.kept)
    measured = [(settings, kept(functools.partial(run_method, args.data, **settings), **settings)) for settings in wanted]
    text = table([{**settings, **result} for settings, result in measured if result])
    print(text)
    if args.write:
        page.write("tune", text)


if __name__ == "__main__":
    main()
