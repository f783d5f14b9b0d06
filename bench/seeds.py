"""Parametrization "seeds" beside LoRA: held-out loss by forward passes and bytes, on the shipped model or another one.

    .venv/bin/python bench/seeds.py --data ../shared/data --tasks e2e medquad --results seeds.jsonl
    .venv/bin/python bench/seeds.py --data ../shared/data --seeds 0 --results seeds.jsonl --model SMOLLM2

Four clients have a task's training text, distributed by label (Dirichlet 0.3, as in bench/tune.py). All methods process as many
windows of 64 tokens: a LoRA step counts as three forward passes, as the backward pass is twice the work. "lora, few bytes" is
LoRA of rank 1 with one A for all, whose rounds are the smallest that LoRA has: one round, with the steps of all rounds, at the
best of three rates on the held-out text. Bytes are those of the ledger, in both directions, of all clients together. In the
task *kinds* each client has another kind of text, and the loss is the mean over held-out text of all kinds. One thread.

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
import random
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import page
import results
import torch
import tune
from arguments import existing_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fedgrove import api, heap
from fedgrove.errors import FedgroveError
from fedgrove.files import read_lines
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import perplexity
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.tune.seeds.moving import Weights
from fedgrove.stages.tune.seeds.offsets import Offsets
from fedgrove.stages.tune.seeds.steps import Steps
from fedgrove.stages.tune.seeds.two_sided import TwoSided, in_memory
from fedgrove.stages.tune.trainers import zeroth_order
from fedgrove.stages.tune.training import Work

STEPS = 20  # of a round
HELD_OUT = 16  # windows of 256 tokens that are measured
ANSWERS = 200  # that are measured instead
TEMPLATES = {"e2e": ("{mr}\n", "{ref}"), "medquad": ("{question}\n", "{answer}")}
KINDS = {**tune.TEXTS, "pubmedqa": "{question}\n{context}"}
CHARACTERS = 400_000  # of each kind
TASKS = ("e2e", "kinds", "medquad", "newsgroups")


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
        "common, rounds of 5": {**seeds, **_shorter(size, 5)},
        "common, rounds of 1": {**seeds, **_shorter(size, 1)},
        "common, one window": {**seeds, "steps": STEPS * size.batch, "batches": [1]},
        "common, K 64": {**seeds, "seeds": 64},
        "common, exact slopes": {**seeds, "trainer": "directional"},
        "common, v_proj": {**seeds, "target_modules": ["v_proj"]},
        "common, v_proj, down_proj": {**seeds, "target_modules": ["v_proj", "down_proj"]},
        "adapters": {**seeds, "method": "adapter_seeds"},
        "adapters, 4 bits": {**seeds, "method": "adapter_seeds", "bits": [4]},
        "adapters, exact slopes": {**seeds, "method": "adapter_seeds", "trainer": "directional"},
        "own, K 4096": {**seeds, "aggregation": "own"},
        "own, pro, K 4096": {**seeds, "aggregation": "own", "sampling": "pro"},
        "lora": {**lora, "rounds": size.rounds, "steps": steps, "ranks": [4]},
        "lora, few bytes": {
            **lora, "rounds": 1, "steps": steps * min(size.rounds, 6), "ranks": [1], "aggregation": "ffa_lora",
            "precision": "bfloat16", "learning_rate": 4e-2,
        },
    }  # fmt: skip


def _shorter(size: Size, steps: int) -> dict[str, int]:
    """As many steps in more rounds; planned again, and measured, after as many steps as before."""
    more = STEPS // steps
    return {"steps": steps, "rounds": size.rounds * more, "replan_every": 5 * more, "eval_every": size.eval_every * more}


METHODS = tuple(methods(SHORT))


@dataclass(frozen=True)
class Task:
    """What the clients of a task have, and what is measured.

    Attributes:
        clients: the keys of each client's table, besides its name.
        measured: the file and the template of each held-out text, by name.
    """

    clients: list[dict[str, Any]]
    measured: dict[str, tuple[Path, str]]


def task_of(task: str, data: Path, folder: Path, seed: int, size: Size) -> Task:
    """Deals a task's training text to the clients."""
    if task == "kinds":
        return kinds(data, folder, seed)
    lines, test = tune.held_out(task, data, folder, validate=False)
    files = tune.deal(task, lines, folder, seed, size.clients)
    text = tune.TEXTS[task]
    templates = dict(zip(("prompt", "answer"), TEMPLATES[task], strict=True)) if size.answers else {"text": text}
    return Task([{"data": file, **templates} for file in files], {task: (test, text)})


def kinds(data: Path, folder: Path, seed: int) -> Task:
    """One kind of text for each client, the same amount of each."""
    clients, measured = [], {}
    for kind, template in sorted(KINDS.items()):
        texts = {}
        for part in ("train", "test"):
            records = read_lines(data / kind / f"{part}.jsonl")
            random.Random(f"{seed}/{kind}" if part == "train" else part).shuffle(records)
            texts[part] = [template.format(**record) for record in records]
        sizes = itertools.accumulate(map(len, texts["train"]))
        texts["train"] = [text for text, end in zip(texts["train"], sizes, strict=True) if end <= CHARACTERS]
        for part, found in texts.items():
            (folder / f"{part}-{kind}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8"
            )
        clients.append({"data": folder / f"train-{kind}.jsonl", "text": "{text}"})
        measured[kind] = folder / f"test-{kind}.jsonl", "{text}"
    return Task(clients, measured)


def run_method(
    data: Path, model: Path, task: str, method: str, seed: int, scale: float | None, long: bool = False, **changes: int
) -> dict[str, Any]:
    """Held-out loss before and after every round, with the bytes so far.

    Args:
        scale: multiplies the measured learning rate of "seeds"; None: as it is.
        long: the size of the trial.
        changes: of that size.
    """
    size = replace(LONG if long else SHORT, **changes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = functools.partial(run, model=model, task=task_of(task, data, folder, seed, size), seed=seed, size=size)
        stage = {"kind": "tune", "eval_every": size.eval_every, **methods(size)[method]}
        if scale is not None:
            first = measured(folder / "first", stage={**stage, "rounds": 1, "steps": 1, "eval_every": 1})
            stage["learning_rate"] = scale * first["rate"]
            stage["perturbation"] = first["perturbation"]
        return measured(folder / "run", stage=stage)


def run(out: Path, model: Path, task: Task, stage: dict[str, Any], seed: int, size: Size) -> dict[str, Any]:
    """Runs a job, and reads its losses, means over the held-out texts, and bytes."""
    wanted = Job.model_validate({
        "name": "bench", "seed": seed, "model": {"path": str(model)},
        "clients": [{"name": f"client-{i}", **client} for i, client in enumerate(task.clients)],
        "stages": [stage],
        "evaluate": {
            "data": [{"name": name, "path": path, "text": text} for name, (path, text) in task.measured.items()],
            "length": 256, "windows": HELD_OUT,
        },
    })  # fmt: skip
    begun = time.monotonic()
    path = api.run(wanted, out, quiet=True).path
    seconds = time.monotonic() - begun
    metrics, ledger = read_lines(path / "metrics.jsonl"), read_lines(path / "ledger.jsonl")
    found = {(line["round"], line["stage"], line["name"]): line["value"] for line in metrics if line["client"] is None}

    def loss(round_: int | None, stage: int | None) -> float:
        return statistics.mean(math.log(found[round_, stage, f"perplexity/{name}"]) for name in task.measured)

    def sent(last: float) -> int:
        return sum(line["bytes"] for line in ledger if line["round"] <= last and line["kind"] != "rounds/capabilities")

    rounds = sorted({round_ for round_, _, name in found if round_ is not None and name.startswith("perplexity/")})
    points = [(sent(round_), loss(round_, 0)) for round_ in rounds]
    before, answers = loss(None, None), {}
    if size.answers:
        ((name, (file, _)),) = task.measured.items()
        both = [answer_losses(folder, name, file) for folder in (model, path / "model")]
        before, points = both[0].mean().item(), [(sent(math.inf), both[1].mean().item())]
        change = both[1] - both[0]
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
    """Markdown: for each task and method the mean over seeds, each seed in brackets; of answers also each seed's change."""
    rows = [
        "| task | method | loss before | loss after (each seed) | change of each seed (95 %) | bytes, all clients | measured η "
        "| minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, method, scale in dict.fromkeys((one["task"], one["method"], one["scale"]) for one in found):
        runs = [one for one in found if (one["task"], one["method"], one["scale"]) == (task, method, scale)]
        ends = [one["points"][-1][1] for one in runs]
        sent = statistics.mean(one["points"][-1][0] for one in runs)
        rates = ", ".join(f"{one['rate']:.1e}" for one in runs if one["rate"])
        changes = ", ".join(f"{one['change']:+.3f} ± {one['interval']:.3f}" for one in runs if "change" in one)
        name = method if scale is None else f"{method}, η × {scale:g}"
        before = statistics.mean(one["before"] for one in runs)
        after = f"{statistics.mean(ends):.3f} ({', '.join(f'{end:.3f}' for end in ends)})"
        minutes = statistics.mean(one["seconds"] for one in runs) / 60
        cells = [task, name, f"{before:.3f}", after, changes, f"{sent / 1000:,.0f} kB", rates, f"{minutes:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def peak(function: Any, *args: Any) -> dict[str, float]:
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
        moving = Weights(Offsets(Path(folder), "0/0", whole), "0/0")
        sided = TwoSided(decoder, moving, torch.zeros(steps, dtype=torch.int64), whole=whole)
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
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with medquad, e2e and the others")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=sorted(TEMPLATES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--long", action="store_true", help="eight clients, a thousand steps, only answers")
    parser.add_argument("--clients", type=int, help="how many instead")
    parser.add_argument("--rounds", type=int, help="how many instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scales", nargs="+", type=float, help="multiples of the measured learning rate to try")
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md, too")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the table of what the file of results holds")
    parser.add_argument("--memory", action="store_true", help="measure memory and seconds of --model instead")
    parser.add_argument("--model", type=existing_folder, default=tune.MODEL)
    parser.add_argument("--steps", type=int, default=2, help="with --memory")
    parser.add_argument("--rate", type=float, default=1e-5, help="with --memory")
    parser.add_argument("--perturbation", type=float, default=2**-9, help="with --memory")
    parser.add_argument("--held", type=int, default=0, help="with --memory: windows whose loss is measured before and after")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.memory:
        print(json.dumps({"evaluate": peak(evaluated, args.model, args.data, 128)}))
        settings = (args.steps, args.rate, args.perturbation, args.held)
        print(json.dumps({"seeds": peak(stepped, args.model, args.data, 128, *settings)}))
        return
    changes = {key: value for key in ("clients", "rounds") if (value := getattr(args, key)) is not None}
    wanted = [
        {"task": task, "method": method, "seed": seed, "scale": scale, "long": args.long, **changes}
        for task, seed, method in itertools.product(args.tasks, args.seeds, args.methods)
        for scale in args.scales or [None]
    ]
    kept = results.Kept(args.results, args.model, only=args.kept)
    measured = []
    for settings in wanted:
        try:
            result = kept(functools.partial(run_method, args.data, args.model, **settings), **settings)
        except FedgroveError as error:  # at a rate that is too large, clients refuse what the server sends
            print(*settings.values(), "ended:", error)
            continue
        measured.append((settings, result))
    text = table([{**settings, **result} for settings, result in measured if result])
    print(text)
    if args.write:
        page.write("seeds-long" if args.long else "seeds", text)


if __name__ == "__main__":
    main()
