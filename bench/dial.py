"""Eight owners of very different text prune one model and keep models of their own: what `personal` is worth to each of them.

    .venv/bin/python bench/dial.py --data ../shared/data
    .venv/bin/python bench/dial.py --data ../shared/data --model smollm2 --compute-dtype bfloat16 --windows 4

Owners and texts are those of bench/owners.py. Three models are measured on held-out text of every owner: what the owner prunes
alone, the shared one, and its own, which it chose by windows of its own text. λ is the part of the others' sums that it chose.
The marks: at most 3 % more perplexity than alone on the owner's own text, and at least 5 % less on the others' (geometric mean
over their texts), for six of eight owners. Every result is kept in bench/dial.jsonl, and not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import owners
import torch
from arguments import existing_folder
from results import Kept

from fedgrove import api
from fedgrove.data.sources import DEFAULT_TEMPLATE
from fedgrove.data.windows import evaluation_windows
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import perplexity
from fedgrove.models.stream import Checkpoint

RESULTS = Path(__file__).with_suffix(".jsonl")
OWN, OTHERS, ENOUGH = 1.03, 0.95, 6  # the marks

Result = dict[str, dict[str, Any]]  # by owner: λ, and the perplexity of the three models on each owner's text


def main() -> None:
    """Runs what is not kept, and prints a table for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with the owners' texts")
    parser.add_argument("--model", default=str(owners.GROVE), help="a folder; the shipped model if left out")
    parser.add_argument("--pruner", default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--personal", type=float, default=0.5, help="held-out windows, as a fraction of samples")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of 512 tokens of each owner, to measure on")
    parser.add_argument("--compute-dtype", default="float32", help="to prune and to measure in")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    api.hush()
    with tempfile.TemporaryDirectory() as folder:
        files = dict(owners.plain_files(given.data, Path(folder)))
        kept = Kept(RESULTS, given.model)
        for seed in given.seeds:
            result = kept(
                partial(measure, files, given, seed, Path(folder)),
                seed=seed, pruner=given.pruner, sparsity=given.sparsity, samples=given.samples, personal=given.personal,
                windows=given.windows, compute_dtype=given.compute_dtype,
            )  # fmt: skip
            print(f"\nSeed {seed}\n\n{table(result)}")


def measure(files: dict[str, Path], given: Any, seed: int, folder: Path) -> Result:
    """Runs a job and measures every owner's own model."""
    stage = {
        "kind": "prune", "pruner": given.pruner, "aggregation": "pooled", "sparsity": given.sparsity, "samples": given.samples,
        "personal": given.personal, "compute_dtype": given.compute_dtype,
    }  # fmt: skip
    job = Job.model_validate(
        {
            "name": "dial",
            "seed": seed,
            "model": {"path": given.model},
            "clients": [{"name": owner, "data": str(files[owner])} for owner in owners.OWNERS],
            "stages": [stage],
            "evaluate": {
                "data": [{"name": owner, "path": str(files[f"{owner}-heldout"])} for owner in owners.OWNERS],
                "windows": given.windows,
                "length": owners.LENGTH,
                "compute_dtype": given.compute_dtype,
                "alone": True,
            },
        }
    )
    with tempfile.TemporaryDirectory(dir=folder) as out:
        done = api.run(job, Path(out) / "run", quiet=True)
        summary, found = done.summary, {}
        shared = perplexities(summary.windows(summary.last, None))
        for owner in owners.OWNERS:
            own = done.path / "clients" / owner / "personal" / "stage-0"
            chosen = json.loads((own / "choice.json").read_text(encoding="utf-8"))["others_weight"]
            found[owner] = {
                "chosen": chosen,
                "alone": perplexities(summary.windows(summary.alone_stage, owner)),
                "shared": shared,
                "personal": shared if chosen == 1 else measured(own, files, given),
            }
    return found


def perplexities(windows: Any) -> dict[str, float]:
    """Perplexity on each text, from (loss, tokens) of its windows."""
    return {
        text: round(math.exp(sum(loss for loss, _ in parts) / sum(tokens for _, tokens in parts)), 3)
        for text, parts in windows.items()
    }


def measured(model: Path, files: dict[str, Path], given: Any) -> dict[str, float]:
    """Perplexity of a model on the held-out text of each owner."""
    decoder, number = Decoder(Checkpoint(model), "cpu", getattr(torch, given.compute_dtype)), given.windows
    tokenizer = decoder.checkpoint.tokenizer()
    return {
        owner: round(
            perplexity(
                decoder, evaluation_windows(files[f"{owner}-heldout"], DEFAULT_TEMPLATE, tokenizer, owners.LENGTH, number)
            ),
            3,
        )
        for owner in owners.OWNERS
    }


def others(perplexity_of: dict[str, float], owner: str) -> float:
    """The geometric mean over the texts of all other owners."""
    return math.exp(statistics.mean(math.log(value) for text, value in perplexity_of.items() if text != owner))


def table(result: Result) -> str:
    """Markdown: a row for each owner, and how many meet both marks."""
    lines = [
        "| owner | λ | own text: alone | shared | its own | of alone | others' text: alone | shared | its own | of alone |",
        f"|---|{'---|' * 9}",
    ]
    met = 0
    for owner, models in result.items():
        own = {name: models[name][owner] for name in ("alone", "shared", "personal")}
        rest = {name: others(models[name], owner) for name in ("alone", "shared", "personal")}
        of_own, of_rest = own["personal"] / own["alone"], rest["personal"] / rest["alone"]
        met += of_own <= OWN and of_rest <= OTHERS
        values = [f"{value:.1f}" for value in own.values()] + [f"{of_own:.3f}"]
        values += [f"{value:.1f}" for value in rest.values()] + [f"{of_rest:.3f}"]
        lines.append(f"| {owner} | {models['chosen']:g} | {' | '.join(values)} |")
    verdict = "met" if met >= ENOUGH else "not met"
    return "\n".join(lines) + f"\n\nBoth marks: {met} of {len(result)} owners ({ENOUGH} wanted: {verdict})."


if __name__ == "__main__":
    main()
