"""Does the tuned model tell whether a window was learnt from? With and without differential privacy.

    .venv/bin/python bench/membership.py --data ../shared/data --write

Every result is kept in bench/membership.jsonl and not measured again; delete a line to
measure it again.

Two owners of newsgroup posts tune the shipped model, each on 64 windows of 32 tokens, for so many steps that it memorizes them
if nothing prevents it. As many windows of other posts are held out. The attack is a threshold on a window's loss; a stronger
one is a threshold on how much that loss fell compared with the model before. Each is chosen on one half of the windows and
used on the other. Another seed gives other posts and, without privacy, other batches (noise cannot be repeated).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import page
import torch
from arguments import existing_folder
from results import Kept
from torch import Tensor
from transformers.utils import logging

from fedgrove import api
from fedgrove.data.sources import DEFAULT_TEMPLATE, read_texts
from fedgrove.data.windows import training_windows
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import negative_log_likelihoods
from fedgrove.models.stream import Checkpoint
from fedgrove.privacy.membership import advantage, bound

RESULTS = Path(__file__).with_suffix(".jsonl")
MODEL = Path(api.__file__).parent / "demo" / "grove-6m"
CLIENTS, WINDOWS, LENGTH, DELTA = 2, 64, 32, 1e-3
TUNE = {
    "kind": "tune", "method": "lora", "rounds": 4, "steps": 10, "length": LENGTH, "batches": [16], "ranks": [16],
    "bits": [32], "learning_rate": 1e-2,
}  # fmt: skip
# Steps without a backward pass. Without noise their rate and perturbation are measured; with noise both have to be given.
SEEDS = {
    "kind": "tune", "method": "seeds", "rounds": 10, "steps": 20, "length": LENGTH, "batches": [16],
}  # fmt: skip
NOISE: dict[str, dict[str, Any]] = {  # by method, besides epsilon
    "lora": {"delta": DELTA, "dp_clip": 0.5},
    "seeds": {"delta": DELTA, "dp_clip": 10.0, "learning_rate": 1e-4, "perturbation": 2**-8},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=existing_folder, required=True, help="the folder with the owners' texts")
    arguments.add_argument("--epsilons", type=float, nargs="*", default=[0.5, 2.0, 8.0])
    arguments.add_argument("--method", choices=("lora", "seeds"), default="lora")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument(
        "--kept", action="store_true", help="measure nothing: the table of what bench/membership.jsonl holds"
    )
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    kept = Kept(RESULTS, MODEL, only=given.kept)
    rows = [
        "| | runs | perplexity, learnt | perplexity, others | advantage by loss | by loss against before | at most, by ε |",
        "|---|---|---|---|---|---|---|",
    ]
    for epsilon in (None, *given.epsilons):
        label = "no privacy" if epsilon is None else f"ε = {epsilon:g}, δ = {DELTA:g}, a window"
        stage = {"lora": TUNE, "seeds": SEEDS}[given.method]
        if epsilon:
            stage = {**stage, **NOISE[given.method], "epsilon": epsilon}
        if given.method == "seeds":
            label = f"`seeds`, {label}"
        results = [kept(partial(measure, given.data, stage, seed), row=label, seed=seed) for seed in given.seeds]
        if found := [result for result in results if result]:
            rows.append(row(label, found, epsilon))
            print(rows[-1], flush=True)
    if given.write:
        page.write("membership" if given.method == "lora" else "membership-seeds", "\n".join(rows))


def measure(data: Path, stage: dict[str, Any], seed: int) -> dict[str, float]:
    """What one tuned model tells about the windows that it learnt from."""
    with tempfile.TemporaryDirectory() as folder:
        files, inside, outside = deal(data, Path(folder), seed)
        before = [losses(MODEL, windows) for windows in (inside, outside)]
        model = tuned(files, stage, Path(folder), seed)
        after = [losses(model, windows) for windows in (inside, outside)]
    return {
        "before": float(before[1].mean().exp()),
        "learnt": float(after[0].mean().exp()),
        "others": float(after[1].mean().exp()),
        "loss": advantage(*after),
        "against": advantage(*(now - then for now, then in zip(after, before, strict=True))),
    }


def deal(data: Path, folder: Path, seed: int) -> tuple[list[Path], Tensor, Tensor]:
    """A file for each owner, the windows that they learn from, and as many of other posts."""
    tokenizer = Checkpoint(MODEL).tokenizer()
    texts = list(read_texts(data / "newsgroups/train.jsonl", "{text}"))
    random.Random(seed).shuffle(texts)
    posts = iter(texts)
    files, dealt = [], []
    for i in range(2 * CLIENTS):
        file = folder / f"owner-{i}.jsonl"
        records: list[str] = []
        while True:
            records.append(json.dumps({"text": next(posts)}))
            file.write_text("\n".join(records) + "\n", encoding="utf-8")
            if len(records) % 5:
                continue
            ids, _ = training_windows([file], {"text": DEFAULT_TEMPLATE}, tokenizer, LENGTH)
            if len(ids) >= WINDOWS:
                break
        files.append(file)
        dealt.append(ids)
    number = min(sum(map(len, dealt[:CLIENTS])), sum(map(len, dealt[CLIENTS:])))
    return files[:CLIENTS], torch.cat(dealt[:CLIENTS])[:number], torch.cat(dealt[CLIENTS:])[:number]


def tuned(files: list[Path], stage: dict[str, Any], out: Path, seed: int) -> Path:
    clients = [{"name": file.stem, "data": str(file)} for file in files]
    job = Job.model_validate(
        {
            "name": "membership",
            "seed": seed,
            "model": {"path": str(MODEL), "dtype": "float32"},
            "clients": clients,
            "stages": [stage],
        }
    )
    return api.run(job, out / "run", quiet=True).path / "model"


def losses(model: Path, windows: Tensor) -> Tensor:
    """(windows,) mean negative log-likelihood of each."""
    decoder = Decoder(Checkpoint(model))
    return torch.tensor([total / count for total, count in negative_log_likelihoods(decoder, [ids[None] for ids in windows])])


def row(label: str, found: list[dict[str, float]], epsilon: float | None) -> str:
    def cell(key: str, form: str) -> str:
        values = [one[key] for one in found]
        each = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{each}"

    most = f"{bound(epsilon, DELTA):.3f}" if epsilon else "1"
    cells = [cell("learnt", ".1f"), cell("others", ".1f"), cell("loss", "+.3f"), cell("against", "+.3f")]
    return f"| {label} | {len(found)} | {' | '.join(cells)} | {most} |"


if __name__ == "__main__":
    main()
