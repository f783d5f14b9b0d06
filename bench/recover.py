"""One job that somebody would use: a real model is pruned to half of its weights and tuned, by four owners of different text.

    .venv/bin/python bench/recover.py --data ../shared/data --model smollm2 --write

The table shows the owners' held-out perplexity of the dense model and after each stage, how many weights are zero, and what the
job cost. Results are kept in bench/recover.jsonl by the model's fingerprint and the settings.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import page
import torch
from arguments import existing_folder
from owners import plain_files
from results import Kept
from transformers.utils import logging

from fedgrove import api
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint

OWNERS = ("medquad", "pubmedqa", "rust", "shakespeare")
RESULTS = Path(__file__).with_suffix(".jsonl")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=existing_folder, required=True, help="the folder with the owners' texts")
    arguments.add_argument("--model", required=True, help="a folder")
    arguments.add_argument("--sparsity", type=float, default=0.5)
    arguments.add_argument("--pruner", default="alps")
    arguments.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens of each owner")
    arguments.add_argument("--rounds", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=8, help="of each owner in a round")
    arguments.add_argument("--batch", type=int, default=4, help="windows of a step")
    arguments.add_argument("--length", type=int, default=256, help="tokens of a window that is trained on")
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--rate", type=float, default=1e-3)
    arguments.add_argument("--windows", type=int, default=8, help="held-out windows of 512 tokens of each owner")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--kept", action="store_true", help="measure nothing: the table of what bench/recover.jsonl holds")
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    others = ("data", "model", "kept", "write")
    settings = {key: value for key, value in vars(given).items() if key not in others}
    result = Kept(RESULTS, given.model, only=given.kept)(partial(measure, given), **settings)
    if result:
        print(table(result))
        if given.write:
            page.write("recover", table(result))


def table(result: dict[str, Any]) -> str:
    """Markdown: perplexity on each owner's held-out text, their geometric mean, and what it is of the dense model's."""
    lines = [f"| | {' | '.join(OWNERS)} | all | of dense | zeros |", f"|---|{'---|' * (len(OWNERS) + 3)}"]
    dense = statistics.geometric_mean(result["perplexities"]["dense"].values())
    for name, by_text in result["perplexities"].items():
        mean = statistics.geometric_mean(by_text.values())
        cells = [f"{by_text[owner]:.1f}" for owner in OWNERS]
        zeros = result["zeros"].get(name)
        cells += [f"{mean:.1f}", f"{mean / dense:.2f}", "" if zeros is None else f"{zeros:.2%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\nThe whole job: {result['seconds'] / 60:.0f} minutes, {result['megabytes']:.0f} MB at its peak.")
    return "\n".join(lines)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the job."""
    with tempfile.TemporaryDirectory() as folder:
        files = dict(plain_files(given.data, Path(folder)))
        prune = {
            "kind": "prune",
            "pruner": given.pruner,
            "aggregation": "pooled",
            "sparsity": given.sparsity,
            "samples": given.samples,
            "compute_dtype": "auto",
        }
        tune = {
            "kind": "tune",
            "method": "lora",
            "rounds": given.rounds,
            "steps": given.steps,
            "batches": [given.batch],
            "ranks": [given.rank],
            "bits": [16],
            "length": given.length,
            "learning_rate": given.rate,
            "lr_schedule": "linear",
        }
        job = {
            "name": "recover",
            "seed": given.seed,
            "model": {"path": given.model},
            "clients": [{"name": owner, "data": str(files[owner])} for owner in OWNERS],
            "stages": [prune, tune],
            "evaluate": {
                "data": [{"name": owner, "path": str(files[f"{owner}-heldout"])} for owner in OWNERS],
                "windows": given.windows,
                "length": 512,
            },
        }
        began = time.perf_counter()
        run = Path(folder) / "run"
        summary = api.run(Job.model_validate(job), run, quiet=True).summary
        seconds = time.perf_counter() - began
        pruned = summary.outcomes[0]
        return {
            "perplexities": {"dense": summary.dense, "pruned": summary.after[0], "pruned and tuned": summary.after[1]},
            "zeros": {"pruned": pruned.zeros / pruned.weights, "pruned and tuned": zeros(run / "model")},
            "seconds": seconds,
            "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def zeros(model: Path) -> float:
    """The fraction of zeros in the linears of a model's blocks."""
    decoder = Decoder(Checkpoint(model))
    weights = [decoder.read_linear(block, name) for block in range(len(decoder)) for name in decoder.block_names(block)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


if __name__ == "__main__":
    main()
