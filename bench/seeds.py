"""Parametrization "seeds" beside LoRA: held-out loss by forward passes and bytes, on the shipped model or another one.

    .venv/bin/python bench/seeds.py --data ../shared/data --tasks e2e medquad --results seeds.jsonl
    .venv/bin/python bench/seeds.py --data ../shared/data --seeds 0 --results seeds.jsonl --model SMOLLM2

Four clients have a task's training text, distributed by label (Dirichlet 0.3, as in bench/tune.py). All methods process as many
windows of 64 tokens: a LoRA step counts as three forward passes, as the backward pass is twice the work. "lora, few bytes" is
LoRA of rank 1 with one A for all, whose rounds are the smallest that LoRA has: one round, with the steps of all rounds, at the
best of three rates on the held-out text.
Bytes are those of the ledger, in both directions, of all clients together. One thread.

    .venv/bin/python bench/seeds.py --data ../shared/data --long --results seeds.jsonl

``--long``: eight clients, fifty rounds of twenty steps of eight windows of 128 tokens, and only answers are learnt (E2E: the
sentence, MedQuAD: the answer). Measured is the loss of held-out answers. Here LoRA has one round of as few bytes as it can.

    .venv/bin/python bench/seeds.py --model FOLDER --memory --data ../shared/data

``--memory`` measures this instead: the peak memory of a round of "seeds" and of measuring perplexity, each in its own
process, in one dtype and on equal windows, and seconds a step.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
import torch
import tune
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fedgrove import api, heap
from fedgrove.files import read_lines
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import perplexity
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.tune.seeds.offsets import Offsets
from fedgrove.stages.tune.seeds.steps import Steps
from fedgrove.stages.tune.seeds.two_sided import TwoSided, in_memory
from fedgrove.stages.tune.trainers import zeroth_order
from fedgrove.stages.tune.training import Work

STEPS = 20  # of a round
HELD_OUT = 16  # windows of 256 tokens that are measured
ANSWERS = 200  # that are measured instead
TEMPLATES = {"e2e": ("{mr}\n", "{ref}"), "medquad": ("{question}\n", "{answer}")}


@dataclass(frozen=True)
class Size:
    """How long a trial is.

    Attributes:
        clients, length, rounds: of the job.
        batch: windows that a client takes in a step, in the mean.
        eval_every: rounds between measurements.
        answers: whether only answers are learnt and measured.
    """

    clients: int
    length: int
    batch: int
    rounds: int
    eval_every: int
    answers: bool


SHORT, LONG = Size(4, 64, 2, 6, 1, False), Size(8, 128, 1, 50, 50, True)


def methods(size: Size) -> dict[str, dict[str, Any]]:
    """The stage of every method."""
    seeds = {"method": "seeds", "rounds": size.rounds, "steps": STEPS, "batches": [size.batch], "length": size.length}
    # A LoRA step takes the time of three forward passes of its windows, and one along a direction that of two.
    steps = round(STEPS * 2 / 3)
    lora = {"method": "lora", "bits": [32], "batches": [size.batch], "length": size.length, "learning_rate": 4e-3}
    return {
        "common": seeds,
        "common, K 64": {**seeds, "seeds": 64},
        "own, K 4096": {**seeds, "aggregation": "own"},
        "own, pro, K 4096": {**seeds, "aggregation": "own", "sampling": "pro"},
        "lora": {**lora, "rounds": size.rounds, "steps": steps, "ranks": [4]},
        "lora, few bytes": {
            **lora, "rounds": 1, "steps": steps * min(size.rounds, 6), "ranks": [1], "aggregation": "ffa_lora",
            "precision": "bfloat16", "learning_rate": 4e-2,
        },
    }  # fmt: skip


METHODS = tuple(methods(SHORT))


def run_method(
    data: Path, model: Path, task: str, method: str, seed: int, scale: float | None, long: bool = False
) -> dict[str, Any]:
    """Held-out loss before and after every round, with the bytes so far.

    Args:
        scale: multiplies the measured learning rate of "seeds"; None: as it is.
        long: the size of the trial.
    """
    size = LONG if long else SHORT
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines, test = tune.held_out(task, data, folder, validate=False)
        files = tune.deal(task, lines, folder, seed, size.clients)
        measured = functools.partial(run, model=model, task=task, files=files, test=test, seed=seed, size=size)
        stage = {"kind": "tune", "eval_every": size.eval_every, **methods(size)[method]}
        if scale is not None:
            first = measured(folder / "first", stage={**stage, "rounds": 1, "steps": 1})
            stage["learning_rate"] = scale * first["rate"]
            stage["perturbation"] = first["perturbation"]
        return measured(folder / "run", stage=stage)


def run(
    out: Path, model: Path, task: str, files: list[Path], test: Path, stage: dict[str, Any], seed: int, size: Size
) -> dict[str, Any]:
    """Runs a job, and reads its losses and bytes."""
    text, (prompt, answer) = tune.TEXTS[task], TEMPLATES[task]
    templates = {"prompt": prompt, "answer": answer} if size.answers else {"text": text}
    wanted = Job.model_validate({
        "name": "bench", "seed": seed, "model": {"path": str(model)},
        "clients": [{"name": f"client-{i}", "data": file, **templates} for i, file in enumerate(files)],
        "stages": [stage],
        "evaluate": {"data": [{"name": task, "path": test, "text": text}], "length": 256, "windows": HELD_OUT},
    })  # fmt: skip
    begun = time.monotonic()
    path = api.run(wanted, out, quiet=True).path
    seconds = time.monotonic() - begun
    metrics, ledger = read_lines(path / "metrics.jsonl"), read_lines(path / "ledger.jsonl")
    found = {(line["round"], line["stage"], line["name"]): line["value"] for line in metrics if line["client"] is None}
    name = f"perplexity/{task}"
    points = []
    for round_ in range(wanted.stages[0].number_of_rounds()):
        sent = sum(line["bytes"] for line in ledger if line["round"] <= round_ and line["kind"] != "rounds/capabilities")
        points.append((sent, math.log(found[round_, 0, name])))
    before, answers = math.log(found[None, None, name]), {}
    if size.answers:
        losses = [answer_losses(folder, task, test) for folder in (model, path / "model")]
        before, points = losses[0].mean().item(), [(points[-1][0], losses[1].mean().item())]
        change = losses[1] - losses[0]
        answers = {"change": change.mean().item(), "interval": 1.96 * change.std().item() / math.sqrt(len(change))}
    return {
        "before": before, "points": points, "seconds": seconds, **answers,
        "rate": found.get((0, 0, "measured/learning_rate")), "perturbation": found.get((0, 0, "measured/perturbation")),
    }  # fmt: skip


def answer_losses(model: Path, task: str, test: Path) -> torch.Tensor:
    """The mean loss per token of each of the first answers of a file."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt, answer = TEMPLATES[task]
    losses: list[torch.Tensor] = []
    for record in read_lines(test)[:ANSWERS]:
        begin, end = (tokenizer(part.format(**record), add_special_tokens=False)["input_ids"] for part in (prompt, answer))
        ids = torch.tensor([[*begin, *end]])[:, :512]
        with torch.no_grad():
            logits = plain(ids).logits[0, len(begin) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(begin) :]))
    by_answer: torch.Tensor = torch.stack(losses)
    return by_answer


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: for each task and method the mean over seeds, each seed in brackets."""
    rows = [
        "| task | method | loss before | loss after (each seed) | bytes, all clients | measured η |",
        "|---|---|---|---|---|---|",
    ]
    for task, method, scale in dict.fromkeys((one["task"], one["method"], one["scale"]) for one in found):
        runs = [one for one in found if (one["task"], one["method"], one["scale"]) == (task, method, scale)]
        ends = [one["points"][-1][1] for one in runs]
        sent = statistics.mean(one["points"][-1][0] for one in runs)
        rates = ", ".join(f"{one['rate']:.1e}" for one in runs if one["rate"])
        name = method if scale is None else f"{method}, η × {scale:g}"
        after = f"{statistics.mean(ends):.3f} ({', '.join(f'{end:.3f}' for end in ends)})"
        rows.append(f"| {task} | {name} | {runs[0]['before']:.3f} | {after} | {sent / 1000:,.0f} kB | {rates} |")
    return "\n".join(rows)


def _peak(function: Any, *args: Any) -> dict[str, float]:
    """What a function returns, and the peak memory in MB of a new process that calls it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: dict[str, float] = pool.apply(_measured, (function, *args))
    return found


def _measured(function: Any, *args: Any) -> dict[str, float]:
    torch.set_num_threads(1)
    heap.keep_large_apart()  # as the command does
    with torch.no_grad():
        found: dict[str, float] = function(*args)
    return found | {"MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _windows(model: Path, data: Path, number: int, length: int) -> torch.Tensor:
    records = map(json.loads, (data / "e2e" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:2000])
    text = "\n\n".join(f"{record['mr']}\n{record['ref']}" for record in records)
    ids = Checkpoint(model).tokenizer()(text, return_tensors="pt")["input_ids"][0]
    return ids[: number * length].view(number, length)


def evaluated(model: Path, data: Path, length: int) -> dict[str, float]:
    """Perplexity of four windows."""
    windows = [window[None] for window in _windows(model, data, 4, length)]
    return {"perplexity": perplexity(Decoder(Checkpoint(model), dtype=torch.float32), windows)}


def stepped(model: Path, data: Path, length: int, steps: int, rate: float, epsilon: float, held: int) -> dict[str, float]:
    """Steps of four windows along random directions; the loss of other windows before and after."""
    decoder = Decoder(Checkpoint(model), dtype=torch.float32)
    whole = in_memory(sum(rows * columns for rows, columns in map(decoder.read_shape, decoder.linear_names())))
    windows = _windows(model, data, 4 * steps + held, length)
    with tempfile.TemporaryDirectory() as folder:
        sided = TwoSided(
            decoder, Offsets(Path(folder), "0/0", whole), torch.zeros(steps, dtype=torch.int64), "0/0", whole=whole
        )
        before = sided.losses(windows[:held], windows[:held], 0, (0.0,))[0] if held else torch.zeros(1)
        begun = time.monotonic()
        work = Work(windows[held:], windows[held:], 0, "s")
        zeroth_order.train(sided, work, Steps(tuple(range(steps)), 4, rate, epsilon, 2**30))
        seconds = (time.monotonic() - begun) / steps
        change = sided.losses(windows[:held], windows[:held], 0, (0.0,))[0] - before if held else before
    interval = 1.96 * float(change.std()) / math.sqrt(max(1, len(change))) if held > 1 else math.nan
    return {"seconds": seconds, "before": float(before.mean()), "change": float(change.mean()), "interval": interval}


def main() -> None:
    """Runs the methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with medquad and e2e")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TEMPLATES), default=sorted(TEMPLATES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--long", action="store_true", help="eight clients, a thousand steps, only answers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scales", nargs="+", type=float, help="multiples of the measured learning rate to try")
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the table of what the file of results holds")
    parser.add_argument("--memory", action="store_true", help="measure memory and seconds of --model instead")
    parser.add_argument("--model", type=Path, default=tune.MODEL)
    parser.add_argument("--steps", type=int, default=2, help="with --memory")
    parser.add_argument("--rate", type=float, default=1e-5, help="with --memory")
    parser.add_argument("--perturbation", type=float, default=2**-9, help="with --memory")
    parser.add_argument("--held", type=int, default=0, help="with --memory: windows whose loss is measured before and after")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.memory:
        print(json.dumps({"evaluate": _peak(evaluated, args.model, args.data, 128)}))
        settings = (args.steps, args.rate, args.perturbation, args.held)
        print(json.dumps({"seeds": _peak(stepped, args.model, args.data, 128, *settings)}))
        return
    wanted = [
        {"task": task, "method": method, "seed": seed, "scale": scale, "long": args.long}
        for task, seed, method in itertools.product(args.tasks, args.seeds, args.methods)
        for scale in args.scales or [None]
    ]
    kept = results.Kept(args.results, args.model, only=args.kept)
    measured = [
        (settings, kept(functools.partial(run_method, args.data, args.model, **settings), **settings)) for settings in wanted
    ]
    print(table([{**settings, **result} for settings, result in measured if result]))


if __name__ == "__main__":
    main()
