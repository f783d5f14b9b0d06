"""What it is worth to leave hard questions to a larger model: a smaller one made of the same model decides by its confidence.

    .venv/bin/python bench/route.py --model SMOLLM2 --data ../shared/data --results bench/route.jsonl --write

Four owners make the model smaller, as in bench/prompts.py, whose tasks these are: half of the weights zero (SparseGPT, pooled),
or a tenth of the MLP channels cut. Then both models answer held-out records. One thread.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import page
import prompts
import results
import torch
from arguments import existing_folder

from fedgrove import api
from fedgrove.report.routing import plain
from fedgrove.route import route

SMALLER: dict[str, dict[str, Any]] = {
    "half zero": {"kind": "prune", "pruner": "sparsegpt", "aggregation": "pooled", "sparsity": 0.5},
    "a tenth cut": {"kind": "structured", "channels": 0.1, "heads": 0},
}
WINDOWS = {"samples": 8, "length": 256}
LENGTH = {"newsgroups": 96, "pubmedqa": 512}  # tokens of a prompt with its label
SHARES = (0.2, 0.4)


def measure(model: Path, data: Path, task: str, way: str, seed: int, test: int) -> dict[str, Any]:
    """What ``fedgrove route`` prints."""
    about = prompts.TASKS[task]
    with tempfile.TemporaryDirectory() as temporary:
        files = prompts.deal(task, data, Path(temporary), seed, test)
        held = files.pop("test")
        job = {
            "name": "route", "seed": seed, "model": {"path": str(model)},
            "clients": [{"name": name, "data": str(file), "text": about["prompt"]} for name, file in files.items()],
            "stages": [{**SMALLER[way], **WINDOWS}],
        }  # fmt: skip
        small = api.run(job, Path(temporary) / "run", quiet=True).path
        labels = [f" {label}" for label in about["labels"]]
        prompt = about["prompt"] + about["start"]
        return plain(
            route(
                small, model, [held], prompt=prompt, answer=" {label}", labels=labels, shares=SHARES, length=LENGTH[task]
            )
        )  # fmt: skip


def table(found: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """Markdown: a row for each task, way and seed."""
    rows = ["| task | smaller model | seed | alone | larger | AUROC (95 %) | "
            + " | ".join(f"{share:.0%} escalated, over as many at random" for share in SHARES) + " |"]  # fmt: skip
    rows.append("|---" * (6 + len(SHARES)) + "|")
    for (task, way, seed), of in found.items():
        auroc = f"{of['auroc']:.2f} ({of['auroc.low']:.2f} to {of['auroc.high']:.2f})"
        points = [
            f"{one['accuracy']:.1%}, {100 * one['more']:+.1f} ({100 * one['more.low']:+.1f} to {100 * one['more.high']:+.1f})"
            for one in of["escalated"]
        ]
        cells = [task, way, str(seed), f"{of['small']:.1%}", f"{of['large']:.1%}", auroc, *points]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows).replace("-", "−").replace("|−−−", "|---")


def main() -> None:
    """Measures what is not kept yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=existing_folder, required=True)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with newsgroups and pubmedqa")
    parser.add_argument("--results", type=Path, help="a JSON-lines file for results")
    parser.add_argument("--tasks", nargs="+", choices=LENGTH, default=list(LENGTH))
    parser.add_argument("--ways", nargs="+", choices=SMALLER, default=list(SMALLER))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--test", type=int, default=240, help="held-out records at most")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md, too")
    args = parser.parse_args()
    api.hush()
    torch.set_num_threads(1)
    keep = results.Kept(args.results, args.model)
    found = {}
    for task, way, seed in itertools.product(args.tasks, args.ways, args.seeds):
        settings = {"task": task, "way": way, "seed": seed, "test": args.test}
        found[task, way, seed] = keep(lambda of=settings: measure(args.model, args.data, **of), route=True, **settings)
    print(table(found))
    if args.write:
        page.write("route", table(found))


if __name__ == "__main__":
    main()
