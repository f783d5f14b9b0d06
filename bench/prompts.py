"""Prompts from scores alone: four owners of labeled records, beside no prompt, a written one, and the searches as published.

    .venv/bin/python bench/prompts.py --model SMOLLM2 --data ../shared/data --results prompts.jsonl

Tasks: which of four newsgroups a post of 64 tokens is from, and PubMedQA's yes, no or maybe. Records are dealt by label
(Dirichlet 0.5; of newsgroups also evenly, and one group to each owner). An owner draws eight records a round, in all tasks but
the first four. Soft prompts are given 800 scores a record set, words, which begin without a written prompt, 600, on half of the
records, and words that owners edit and vote for 288, on twice the records; "random" is the best of 20 prompts drawn like those
of words, on as many records as these in all. Prompts are scored in bfloat16. Accuracy is that of held-out records; intervals
of a difference are paired bootstraps over these records. Every run is the product's, in one thread; results are kept, so a run
that was stopped goes on.

    .venv/bin/python bench/prompts.py --model FOLDER --data ../shared/data --memory

``--memory`` measures this instead: the peak memory of scoring one round's candidates on an owner's posts and of measuring
perplexity (four windows of 128 tokens), each in its own process, in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import page
import results
import torch
from arguments import existing_folder
from seeds import evaluated, peak
from transformers.utils import logging

from fedgrove import api
from fedgrove.evaluation.metrics import interval, resampled
from fedgrove.files import read_lines
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.split import by_dirichlet
from fedgrove.stages.prompt.records import read_records
from fedgrove.stages.prompt.scoring import Prompt, losses, score

OWNERS, RECORDS, POPULATION, TOKENS = 4, 8, 20, 8
ALPHAS = {"": 0.5, "dealt evenly": 1e6, "one group each": 0.0}  # of a task, after a comma
GROUPS = {"sci.med": "medicine", "sci.space": "space", "rec.autos": "cars", "talk.politics.guns": "guns"}
TASKS: dict[str, dict[str, Any]] = {
    "newsgroups": {
        "labels": list(GROUPS.values()), "prompt": "{text}", "length": 66, "start": "\nThis post is about", "field": "label",
    },
    "pubmedqa": {
        "labels": ["yes", "no", "maybe"], "prompt": "{context}\nQuestion: {question}", "length": 194,
        "start": "\nAnswer (yes, no or maybe):", "field": "decision", "records": RECORDS // 2,
        "votes": {"tokens": 9},  # as many as the start has
    },
}  # fmt: skip
FASTER = {"compute_dtype": "bfloat16"}
WORDS = {"method": "categories", "tokens": 6, "choices": 50, "start": None, **FASTER}
WAYS: dict[str, dict[str, Any]] = {  # with as many scores of each record set: rounds · population, and 41 in a round alone
    "pooled": {"rounds": 40, "population": POPULATION, **FASTER},
    "pooled, twice the records": {"rounds": 40, "population": POPULATION, "records": 2 * RECORDS, **FASTER},
    "local": {"aggregation": "local", "rounds": 20, "generations": 8, "population": 5, **FASTER},
    "local, Eq. 7": {
        "aggregation": "local", "rounds": 10, "generations": 8, "population": 5, "against_overfitting": 0.5, **FASTER,
    },
    "mean": {"aggregation": "mean", "rounds": 20, "generations": 8, "population": 5, **FASTER},
    "words": {**WORDS, "rounds": 30, "population": POPULATION, "records": RECORDS // 2},
    "votes": {
        "method": "tokens", "rounds": 6, "population": 10, "generations": 4, "tokens": 5, "records": 2 * RECORDS,
        **FASTER,
    },
    "random": {**WORDS, "rounds": 1, "population": POPULATION, "records": 15 * RECORDS},
}  # fmt: skip
TASKS |= {f"newsgroups, {how}": TASKS["newsgroups"] | {"records": RECORDS // 2} for how in ALPHAS if how}
PROMPTS = ("no_prompt", "start_prompt", "found_prompt")


def deal(task: str, data: Path, folder: Path, seed: int, test: int | None) -> dict[str, Path]:
    """A file of records for each owner, and "test"."""
    name, _, how = task.partition(", ")
    about, files, alpha = TASKS[task], {}, ALPHAS[how]
    for part in ("train", "test"):
        rows = read_lines(data / name / f"{part}.jsonl")
        rows = [{**row, "label": GROUPS.get(row[about["field"]], row[about["field"]])} for row in rows]
        rows = [row for row in rows if row["label"] in about["labels"]]
        rng = np.random.default_rng([seed, len(rows)])
        order = rng.permutation(len(rows)).tolist()
        if part == "test":
            files["test"] = _write(folder / "test.jsonl", [rows[i] for i in sorted(order)[:test] or order])
            continue
        labels = [row["label"] for row in rows]
        if alpha:
            dealt = by_dirichlet(order, labels, OWNERS, alpha, rng)
        else:
            dealt = [[i for i in order if labels[i] == label] for label in about["labels"]]
        for number, owned in enumerate(one for one in dealt if one):
            files[f"owner-{number}"] = _write(folder / f"owner-{number}.jsonl", [rows[i] for i in owned])
    return files


def _write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def measure(model: Path, data: Path, task: str, way: dict[str, Any], seed: int, test: int | None) -> dict[str, Any]:
    """One run: right or wrong for each held-out record and prompt, bytes that an owner sends, scores, and seconds."""
    about = TASKS[task]
    with tempfile.TemporaryDirectory() as temporary:
        files = deal(task, data, Path(temporary), seed, test)
        templates = {"prompt": about["prompt"], "answer": " {label}"}
        stage = {"kind": "prompt", "labels": [f" {label}" for label in about["labels"]], "length": about["length"]}
        job = {
            "name": "prompts",
            "seed": seed,
            "model": {"path": str(model)},
            "clients": [{"name": n, "data": str(file), **templates} for n, file in files.items() if n != "test"],
            "stages": [{**stage, "start": about["start"], "records": about.get("records", RECORDS), **way}],
            "evaluate": {"data": [{"name": "test", "path": str(files["test"]), "measure": "prompt", **templates}]},
        }
        start = time.process_time()
        run = api.run(job, out=Path(temporary) / "run", quiet=True).path
        seconds = time.process_time() - start
        right = {line["name"].partition("/")[0]: [n for n, _ in line["parts"]] for line in read_lines(run / "examples.jsonl")}
        metrics = [line for line in read_lines(run / "metrics.jsonl") if line["client"] is None]
        ledger = [line for line in read_lines(run / "ledger.jsonl") if line["kind"].startswith("prompt/")]
        owner = ledger[0]["client"]
        sent = {way: sum(one["bytes"] for one in ledger if (one["client"], one["direction"]) == (owner, way))
                for way in ("up", "down")}  # fmt: skip
        made = json.loads((run / "prompt.json").read_text(encoding="utf-8"))
        return {
            "right": right,
            "rounds": [[line["value"] for line in metrics if line["name"] == name] for name in ("best", "mean")],
            "scores": sum(line["value"] for line in metrics if line["name"] == "calls"),
            "tested": sum(map(len, right.values())),
            **sent,
            "seconds": seconds,
            "finalists": made["finalists"],
            "best": made["best"],
            "text": made.get("text"),
        }


def scored(model: Path, data: Path) -> dict[str, float]:
    """Scores a round's soft prompts on eight posts."""
    about = TASKS["newsgroups"]
    with tempfile.TemporaryDirectory() as folder:
        files = deal("newsgroups", data, Path(folder), 0, RECORDS)
        decoder = Decoder(Checkpoint(model), dtype=torch.float32)
        labels = tuple(f" {label}" for label in about["labels"])
        tokenizer = decoder.checkpoint.tokenizer()
        records = read_records([files["test"]], about["prompt"], " {label}", labels, tokenizer, about["length"])
        generator = torch.Generator().manual_seed(0)
        width = decoder.checkpoint.config.get_text_config().hidden_size
        prompts = [Prompt(torch.randn(TOKENS, width, generator=generator), written=False) for _ in range(POPULATION)]
        return {"loss": float(losses(score(decoder, records, prompts, "end"), records).mean())}


def difference(one: list[float], other: list[float]) -> tuple[float, float]:
    """The 95 % interval of the difference of two accuracies on the same records."""
    means = resampled([{"one": [(n, 1.0) for n in one], "other": [(n, 1.0) for n in other]}])
    return interval(means["one"] - means["other"])


def table(found: dict[tuple[str, str, int], dict[str, Any]]) -> list[str]:
    """A row for each task and way: mean accuracies over the seeds, and in how many seeds the prompt is better for sure."""
    rows = ["| task | way | no prompt | start | found | above none | above start | up | down | scores | s a score |"]
    rows.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for task, way in dict.fromkeys((task, way) for task, way, _ in found):
        runs = [one for (*which, _), one in found.items() if which == [task, way]]
        right = [one["right"] for one in runs]
        known = [name for name in PROMPTS if name in right[0]]
        means = {name: statistics.mean(statistics.mean(one[name]) for one in right) for name in known}
        accuracies = [f"{means[name]:.1%}" if name in means else "" for name in PROMPTS]
        above = []
        for other in PROMPTS[:2]:
            if other not in known:
                above.append("")
                continue
            clear = sum(difference(one["found_prompt"], one[other])[0] > 0 for one in right)
            above.append(f"{clear} of {len(right)}")
        first = runs[0]
        cost = statistics.mean(one["seconds"] / (one["scores"] + one["tested"]) for one in runs)
        traffic = [f"{first['up']:,}", f"{first['down']:,}", f"{first['scores']:,.0f}", f"{cost:.3f}"]
        rows.append(f"| {task} | {way} | {' | '.join([*accuracies, *above, *traffic])} |")
    return rows


def against(found: dict[tuple[str, str, int], dict[str, Any]], way: str, other: str) -> list[str]:
    """A line for each task and seed: how much more often the prompt of one way is right than that of another."""
    lines = []
    for (task, name, seed), one in found.items():
        if name == way and (task, other, seed) in found:
            pair = one["right"]["found_prompt"], found[task, other, seed]["right"]["found_prompt"]
            low, high = difference(*pair)
            gain = statistics.mean(pair[0]) - statistics.mean(pair[1])
            lines.append(f"{task}, seed {seed}: {way} against {other}: {gain:+.1%} ({low:+.1%} to {high:+.1%})")
    return lines


def main() -> None:
    """Measures what is not kept yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=existing_folder, required=True)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with newsgroups and pubmedqa")
    parser.add_argument("--results", type=Path, help="a JSON-lines file for results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["newsgroups", "pubmedqa"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="fewer rounds, for a try")
    parser.add_argument("--test", type=int, help="fewer held-out records, for a try")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md, too")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the table of what the file of results holds")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--set", nargs="*", default=[], help="keys of the stage, such as spread=0.1, for a try")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.memory:
        both = peak(evaluated, args.model, args.data, 128), peak(scored, args.model, args.data)
        print(json.dumps(dict(zip(("evaluate", "score"), both, strict=True))))
        return
    keep = results.Kept(args.results, args.model, only=args.kept)
    changes = {key: json.loads(value) for key, _, value in (one.partition("=") for one in args.set)}
    found = {}
    for task, way, seed in itertools.product(args.tasks, args.ways, args.seeds):
        stage = {
            **WAYS[way],
            **TASKS[task].get(way, {}),
            **({"rounds": args.rounds} if args.rounds and WAYS[way]["rounds"] > 1 else {}),
            **changes,
        }
        result = keep(
            lambda task=task, stage=stage, seed=seed: measure(args.model, args.data, task, stage, seed, args.test),
            task=task,
            way=way,
            stage=stage,
            seed=seed,
            test=args.test,
        )
        if result is not None:
            found[task, way, seed] = result
    text = "\n".join(table(found))
    print("\n".join([text, *against(found, "words", "random"), *against(found, "pooled", "local")]))
    if args.write:
        page.write("prompts", text)


if __name__ == "__main__":
    main()
