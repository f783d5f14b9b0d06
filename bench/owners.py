"""Eight owners of very different text prune one model: every aggregation beside stand-alone and centralized pruning.

    .venv/bin/python bench/owners.py --data ../shared/data --model smollm2 --page owners --write
    .venv/bin/python bench/owners.py --data ../shared/data --targets 0.5 0.7 --table damping --page owners-grove --write
    .venv/bin/python bench/owners.py --data ../shared/data --targets 0.7 --table allocations --page allocations --write
    .venv/bin/python bench/owners.py --data ../shared/data --targets 0.3 0.5 0.6 --table mending --owners 4 --length 256
        --windows 4 --page mending --write
    .venv/bin/python bench/owners.py --data ../shared/data --targets 0.5 0.7 --table mending --owners 4 --length 256
        --windows 4 --rows SparseGPT --tuned --page mending-tuned --write

Every result is kept in bench/owners.jsonl by the model's fingerprint and its settings, and not measured again; delete a line to
measure it again.

Owners: medical questions, research abstracts, newsgroup posts, a programming book, plays, restaurant descriptions, an
encyclopaedia, novels. Each calibrates on its own training text and all are measured on held-out text of every owner.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import page
import torch
from arguments import existing_folder
from results import Kept
from transformers.utils import logging

from fedgrove import api
from fedgrove.data.sources import read_texts
from fedgrove.job.tables import Job
from fedgrove.report.paired import Examples, ratio_interval
from fedgrove.report.summary import Summary

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
RESULTS = Path(__file__).with_suffix(".jsonl")
GROVE = Path(api.__file__).parent / "demo" / "grove-6m"
LENGTH = 512  # tokens of a window, to calibrate and to measure

Result = dict[str, Any]
Row = dict[str, Any]  # keys of the stage
FEDSPALLM = "FedSpaLLM (fedspallm)"
ALONE = "stand-alone, mean of the eight models"
CENTRALIZED = "centralized (one client has all the text)"
AGGREGATIONS: dict[str, Row] = {
    ALONE: {},
    "plain averaging (fedavg)": {"aggregation": "fedavg"},
    "FedPrLLM (fedprllm)": {"aggregation": "fedprllm"},
    FEDSPALLM: {},
    "FedSpaLLM, γ = ½ (fedspallm, shrink 0.5)": {"shrink": 0.5},
    "pooled statistics of the dense model, one pass (pooled)": {"aggregation": "pooled"},
    "pooled statistics, block by block (pooled, source sequential)": {"aggregation": "pooled", "source": "sequential"},
    CENTRALIZED: {},
    "pooled statistics of the dense model, ALPS (pooled, pruner alps)": {"aggregation": "pooled", "pruner": "alps"},
}
DAMPING: dict[str, Row] = {
    FEDSPALLM: {},
    "FedSpaLLM, each channel damped by its own size (fedspallm, damping each)": {"damping": "each"},
    "FedSpaLLM on the dense model's inputs (fedspallm, source dense)": {"source": "dense"},
    "ℓ0-mean, no expansion (fedspallm, expand false)": {"expand": False},
    "the dense model's, damped as published (pooled, damping mean)": {"aggregation": "pooled", "damping": "mean"},
    "block by block, damped as published (pooled, source sequential, damping mean)": {
        "aggregation": "pooled",
        "source": "sequential",
        "damping": "mean",
    },
}
ALLOCATIONS: dict[str, Row] = {
    "Wanda, pooled": {"pruner": "wanda", "aggregation": "pooled"},
    "Wanda, pooled, OWL": {"pruner": "wanda", "aggregation": "pooled", "allocation": "owl"},
    "SparseGPT, fedspallm": {},
    "SparseGPT, fedspallm, OWL": {"allocation": "owl"},
}
MENDING: dict[str, Row] = {
    "SparseGPT, fedspallm": {},
    "SparseGPT, fedspallm, mended": {"mend": "dsnot"},
    "SparseGPT, fedprllm": {"aggregation": "fedprllm"},
    "SparseGPT, fedprllm, mended": {"aggregation": "fedprllm", "mend": "dsnot"},
    "Wanda, fedspallm": {"pruner": "wanda"},
    "Wanda, fedspallm, mended": {"pruner": "wanda", "mend": "dsnot"},
    "Wanda, pooled": {"pruner": "wanda", "aggregation": "pooled"},
    "Wanda, pooled, mended": {"pruner": "wanda", "aggregation": "pooled", "mend": "dsnot"},
    "magnitude, fedspallm": {"pruner": "magnitude"},
    "magnitude, fedspallm, mended": {"pruner": "magnitude", "mend": "dsnot"},
    "SparseGPT, pooled": {"aggregation": "pooled"},
    "SparseGPT, pooled, mended": {"aggregation": "pooled", "mend": "dsnot"},
}
TUNE: Row = {
    "kind": "tune", "method": "lora", "rounds": 3, "steps": 3, "length": 256, "batches": [2], "ranks": [16], "bits": [32],
    "learning_rate": 4e-3, "precision": "float32",
}  # fmt: skip
TABLES = {"aggregations": AGGREGATIONS, "damping": AGGREGATIONS | DAMPING, "allocations": ALLOCATIONS, "mending": MENDING}
MENDED = ", mended"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=existing_folder, required=True, help="the folder with the owners' texts")
    arguments.add_argument("--model", default=str(GROVE), help="a folder; the shipped model if left out")
    arguments.add_argument("--table", choices=TABLES, default="aggregations")
    arguments.add_argument("--rows", nargs="+", help="only the rows that contain one of these words")
    arguments.add_argument("--targets", nargs="+", default=["0.5", "0.6", "2:4"], help="sparsities, or patterns such as 2:4")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--windows", type=int, default=8, help="held-out windows of each owner")
    arguments.add_argument("--owners", type=int, default=len(OWNERS), help="how many of them")
    arguments.add_argument("--length", type=int, default=LENGTH, help="tokens of a window, to calibrate and to measure")
    arguments.add_argument("--tuned", action="store_true", help="then tune the model: 3 rounds of 3 steps of LoRA")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--kept", action="store_true", help="measure nothing: the table of what bench/owners.jsonl holds")
    arguments.add_argument("--page", help="the name of the place in docs/benchmarks.md", default="owners")
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    rows = {
        name: row for name, row in TABLES[given.table].items() if not given.rows or any(word in name for word in given.rows)
    }
    with tempfile.TemporaryDirectory() as folder:
        files = dict(plain_files(given.data, Path(folder)))
        kept = Kept(RESULTS, given.model, only=given.kept)
        found: dict[tuple[str, str], dict[int, Result]] = {}
        usual = {"owners": len(OWNERS), "length": LENGTH, "tuned": False}
        settings = {key: getattr(given, key) for key, value in usual.items() if getattr(given, key) != value}
        for target in given.targets:
            for seed in given.seeds:
                for name, row in rows.items():
                    same = FEDSPALLM if name == ALONE else name  # one run gives both
                    measured = kept(
                        partial(measure, same, row, target, seed, files, given, Path(folder)),
                        row=same, target=target, seed=seed, samples=given.samples, windows=given.windows, **settings,
                    )  # fmt: skip
                    if measured:
                        found.setdefault((name, target), {})[seed] = measured
    text = table(list(rows), given.targets, found, given.length)
    print(text)
    if given.write:
        page.write(given.page, text)


def table(
    rows: Sequence[str], targets: Sequence[str], found: Mapping[tuple[str, str], Mapping[int, Result]], length: int
) -> str:
    """Markdown: perplexity, mean over seeds (each seed), and below it what it is of the base row's with its 95 % interval.

    The base of a mended row is the same without the mending, that of all others is FedSpaLLM.
    """
    lines = [f"| | {' | '.join(map(as_percent, targets))} |", f"|---|{'---|' * len(targets)}"]
    for name in rows:
        cells = []
        for target in targets:
            by_seed, base = found.get((name, target), {}), found.get((base_of(name, rows), target), {})
            both = [base[seed] for seed in by_seed if seed in base]
            cells.append(cell(name, list(by_seed.values()), both, target, length) if by_seed else "not run")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    dense = {result["dense"] for results in found.values() for result in results.values() if "dense" in result}
    return "\n".join(lines) + "".join(f"\n\nThe dense model: {value:.1f}." for value in sorted(dense))


def base_of(name: str, rows: Sequence[str]) -> str:
    """The row that a row is compared with."""
    plain = name.removesuffix(MENDED)
    return plain if name != plain and plain in rows else FEDSPALLM


def cell(name: str, results: list[Result], base: list[Result], target: str, length: int) -> str:
    values = [result["alone"] if name == ALONE else result["perplexity"] for result in results]
    text = f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"
    reached = statistics.mean(result["sparsity"] for result in results)
    if ":" not in target and name != ALONE and abs(reached - float(target)) > 1e-3:
        text += f" at {reached:.0%}"
    if name == FEDSPALLM or not base:
        return text
    ratio = statistics.mean(values) / statistics.mean(result["perplexity"] for result in base)
    between = ratio_interval(
        [model for result in results for model in models(result, length, alone=name == ALONE)],
        [model for result in base for model in models(result, length)],
        list(results[0].get("losses", OWNERS)),
    )
    return f"{text}<br>{ratio:.3f}" + (f" [{between[0]:.3f}, {between[1]:.3f}]" if between else "")


def models(result: Result, length: int, alone: bool = False) -> list[Examples]:
    """(loss, tokens) of each held-out window, by owner: of the federated model, or of every owner's own."""
    if "losses" not in result:
        return [{}]  # measured before losses were kept
    chosen = result["losses_alone"].values() if alone else [result["losses"]]
    return [examples(model, length) for model in chosen]


def examples(losses: Mapping[str, Sequence[float]], length: int) -> Examples:
    """(loss, tokens) of each held-out window of one model, by owner, from the losses alone."""
    return {text: [(loss, length - 1) for loss in of_text] for text, of_text in losses.items()}


def measure(name: str, changes: Row, target: str, seed: int, files: dict[str, Path], given: Any, folder: Path) -> Result:
    """Perplexity (geometric mean over the held-out texts), the sparsity that was reached, and the loss of each window."""
    alone = name == FEDSPALLM and not given.tuned
    names = list(OWNERS)[: given.owners]
    clients: list[dict[str, Any]] = [{"name": owner, "data": str(files[owner])} for owner in names]
    samples = given.samples
    if name == CENTRALIZED:
        clients = [{"name": "all", "data": [str(files[owner]) for owner in names]}]
        samples *= len(names)
    wanted = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    job = Job.model_validate(
        {
            "name": "owners",
            "seed": seed,
            "model": {"path": given.model},
            "clients": clients,
            "stages": [
                {"kind": "prune", **wanted, "samples": samples, "length": given.length, **changes},
                *([TUNE] if given.tuned else []),
            ],
            "evaluate": {
                "data": [{"name": owner, "path": str(files[f"{owner}-heldout"])} for owner in names],
                "windows": given.windows,
                "length": given.length,
                "alone": alone,
            },
        }
    )
    with tempfile.TemporaryDirectory(dir=folder) as out:
        summary = api.run(job, Path(out) / "run", quiet=True).summary
    result = {
        "dense": summary.mean(summary.dense),
        "perplexity": summary.mean(summary.federated),
        "sparsity": summary.sparsity,
        "losses": losses(summary, summary.last, None),
    }
    if alone:
        result["alone"] = summary.alone_mean
        result["losses_alone"] = {owner: losses(summary, summary.alone_stage, owner) for owner in names}
    return result


def losses(summary: Summary, stage: int | None, client: str | None) -> dict[str, list[float]]:
    """Negative log-likelihood of each held-out window, by owner of the text."""
    return {text: [round(loss, 2) for loss, _ in parts] for text, parts in summary.windows(stage, client).items()}


def as_percent(target: str) -> str:
    return target if ":" in target else f"{float(target):.0%}"


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
