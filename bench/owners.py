"""Eight owners of very different text prune one model: every aggregation compared with stand-alone and centralized pruning.

    .venv/bin/python bench/owners.py --data ../shared/data --write
    .venv/bin/python bench/owners.py --data ../shared/data --table allocations --sparsities 0.7 --write

Every result is kept in bench/owners.json and not measured again; delete the file to measure everything again.

Owners: medical questions, research abstracts, newsgroup posts, a programming book, plays, restaurant descriptions, an
encyclopaedia, novels. Each calibrates on its own training text and all are measured on held-out text of every owner.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import page
import torch
from results import Kept
from transformers.utils import logging

from fedgrove import api
from fedgrove.data.sources import read_texts
from fedgrove.job.tables import Job

QUESTION = "{question}\n{answer}"
ABSTRACT = "{question}\n{context}\n{answer}"
OWNERS = {
    "medquad": ("medquad/train.jsonl", "medquad/test.jsonl", QUESTION),
    "pubmedqa": ("pubmedqa/train.jsonl", "pubmedqa/test.jsonl", ABSTRACT),
    "newsgroups": ("newsgroups/train.jsonl", "newsgroups/test.jsonl", "{text}"),
    "rust": ("text/rustbook-train.txt", "text/rustbook-test.txt", None),
    "shakespeare": ("text/shakespeare-train.txt", "text/shakespeare-test.txt", None),
    "e2e": ("e2e/train.jsonl", "e2e/test.jsonl", "{mr}\n{ref}"),
    "wikitext": ("text/wikitext2-valid.txt", "text/wikitext2-test.txt", None),
    "novels": (
        "books/Edith_Nesbit_The_Railway_Children.txt",
        "books/G_K_Chesterton_The_Club_of_Queer_Trades.txt",
        None,
    ),
}
RESULTS = Path(__file__).with_suffix(".json")
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "FedSpaLLM (fedspallm)": {},
    "FedSpaLLM, each channel damped by its own size (fedspallm, damping each)": {"damping": "each"},
    "FedSpaLLM, γ = ½ (fedspallm, shrink 0.5)": {"shrink": 0.5},
    "FedSpaLLM on the dense model's inputs (fedspallm, source dense)": {"source": "dense"},
    "ℓ0-mean, no expansion (fedspallm, expand false)": {"expand": False},
    "plain averaging (fedavg)": {"aggregation": "fedavg"},
    "FedPrLLM (fedprllm)": {"aggregation": "fedprllm"},
    "pooled statistics of the dense model, one pass (pooled)": {"aggregation": "pooled"},
    "pooled statistics, block by block (pooled, source sequential)": {"aggregation": "pooled", "source": "sequential"},
    "the dense model's, damped as published (pooled, damping mean)": {"aggregation": "pooled", "damping": "mean"},
    "block by block, damped as published (pooled, source sequential, damping mean)": {
        "aggregation": "pooled",
        "source": "sequential",
        "damping": "mean",
    },
}

ALLOCATIONS: dict[str, dict[str, Any]] = {
    "Wanda, pooled": {"pruner": "wanda", "aggregation": "pooled"},
    "Wanda, pooled, OWL": {"pruner": "wanda", "aggregation": "pooled", "allocation": "owl"},
    "SparseGPT, fedspallm": {},
    "SparseGPT, fedspallm, OWL": {"allocation": "owl"},
}
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "aggregations": {
        **AGGREGATIONS,
        "stand-alone, mean of the eight models": {},
        "centralized (one client has all the text)": {},
    },
    "allocations": ALLOCATIONS,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="the folder with the owners' texts")
    arguments.add_argument("--model", default=str(Path(api.__file__).parent / "demo" / "grove-6m"))
    arguments.add_argument(
        "--table", choices=TABLES, default="aggregations", help="the aggregations, or even and uneven sparsity"
    )
    arguments.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--windows", type=int, default=8, help="held-out windows of 512 tokens of each owner")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--kept", action="store_true", help="measure nothing: the table of what bench/owners.json holds")
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as folder:
        files = dict(plain_files(given.data, Path(folder)))
        kept = Kept(RESULTS, only=given.kept)
        table = []
        for name, changes in TABLES[given.table].items():
            cells = []
            for sparsity in given.sparsities:
                found = []
                for seed in given.seeds:
                    key = f"{name}, {sparsity:.0%}, seed {seed}, {given.samples} samples, {given.windows} windows"
                    again = partial(measure, name, changes, sparsity, seed, files, given, Path(folder))
                    if result := kept(key, again):
                        found.append(result)
                if not found:
                    cells.append("not run")
                    continue
                values = [value for value, _ in found]
                achieved = statistics.mean(reached for _, reached in found)
                cell = f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"
                cells.append(cell if abs(achieved - sparsity) < 1e-3 else f"{cell} at {achieved:.0%}")
            table.append(f"| {name} | {' | '.join(cells)} |")
    head = " | ".join(f"{sparsity:.0%}" for sparsity in given.sparsities)
    text = "\n".join([f"| | {head} |", f"|---|{'---|' * len(given.sparsities)}", *table])
    print(text)
    if given.write:
        page.write("owners" if given.table == "aggregations" else given.table, text)


def measure(
    name: str, changes: dict[str, Any], sparsity: float, seed: int, files: dict[str, Path], given: Any, folder: Path
) -> tuple[float, float]:
    """Perplexity (geometric mean over the owners' held-out texts) and the sparsity that was reached."""
    alone = name.startswith("stand-alone")
    clients: list[dict[str, Any]] = [{"name": owner, "data": str(files[owner])} for owner in OWNERS]
    samples = given.samples
    if name.startswith("centralized"):
        clients = [{"name": "all", "data": [str(files[owner]) for owner in OWNERS]}]
        samples *= len(OWNERS)
    job = Job.model_validate(
        {
            "name": "owners",
            "seed": seed,
            "model": {"path": given.model},
            "clients": clients,
            "stages": [{"kind": "prune", "sparsity": sparsity, "samples": samples, **changes}],
            "evaluate": {
                "data": [{"name": owner, "path": str(files[f"{owner}-heldout"])} for owner in OWNERS],
                "windows": given.windows,
                "alone": alone,
            },
        }
    )
    with tempfile.TemporaryDirectory(dir=folder) as out:
        summary = api.run(job, Path(out) / "run", quiet=True).summary
    if alone:
        assert summary.alone_mean is not None
        return summary.alone_mean, summary.sparsity
    return summary.mean(summary.federated), summary.sparsity


def plain_files(data: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Every owner's text as records {"text"}, so that all of it in one place needs only one template."""
    for owner, (train, heldout, template) in OWNERS.items():
        for name, source in ((owner, train), (f"{owner}-heldout", heldout)):
            file = folder / f"{name}.jsonl"
            with file.open("w", encoding="utf-8") as out:
                for text in read_texts(data / source, template):
                    out.write(json.dumps({"text": text}) + "\n")
            yield name, file


if __name__ == "__main__":
    main()
