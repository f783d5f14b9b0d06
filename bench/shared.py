"""Which inputs should prune a matrix that all blocks share: those of all blocks, or those of the first?

    .venv/bin/python bench/shared.py

The model is the demo's with the mean of its feed-forward parts in every block, tuned together by the demo's four owners until
it is a language model again. Then they prune it from pooled sums, with three seeds. "first" takes the sums over the inputs of
the first block that has a matrix, which is what one would do who thinks of it as that block's. The table shows held-out
perplexities.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import fedgrove
from fedgrove import api
from fedgrove.job.tables import Job
from fedgrove.stages.prune import pooled, shared

DEMO = Path(fedgrove.__file__).parent / "demo"
BLOCKS = 6
MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
SHARES = {f"model.layers.*.{name}": f"model.layers.0.{name}" for name in MLP}
SEEDS = (0, 1, 2)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=6, help="of tuning")
    arguments.add_argument("--steps", type=int, default=16, help="of each owner in a round")
    arguments.add_argument("--samples", type=int, default=8, help="calibration windows of 256 tokens of each owner")
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tied = tie(folder / "tied")
        tune = {
            "kind": "tune", "method": "full", "rounds": given.rounds, "steps": given.steps, "batches": [4], "length": 128,
            "learning_rate": 1e-3, "lr_schedule": "linear",
        }  # fmt: skip
        before, after = run(folder / "tuned", tied, tune, 0)
        print(f"feed-forward parts tied: {before:.1f}; tuned: {after:.1f}\n", flush=True)
        print("| pruner | sparsity | seed | all blocks | first block |\n|---|---|---|---|---|")
        for pruner, sparsity in (("wanda", 0.5), ("sparsegpt", 0.5)):
            for seed in SEEDS:
                stage = {
                    "kind": "prune", "pruner": pruner, "aggregation": "pooled", "sparsity": sparsity, "samples": given.samples,
                    "length": 256,
                }  # fmt: skip
                name = f"{pruner}-{sparsity}-{seed}"
                _, of_all = run(folder / name, folder / "tuned" / "model", stage, seed)
                with mock.patch.object(pooled, "add_uses", first_use):
                    _, of_first = run(folder / f"{name}-first", folder / "tuned" / "model", stage, seed)
                print(f"| {pruner} | {sparsity} | {seed} | {of_all:.2f} | {of_first:.2f} |", flush=True)


def tie(folder: Path) -> Path:
    """The demo's model with the mean of its feed-forward parts, stored once."""
    folder.mkdir()
    for file in (DEMO / "grove-6m").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in MLP:
        each = [tensors.pop(f"model.layers.{block}.{name}") for block in range(BLOCKS)]
        tensors[f"model.layers.0.{name}"] = torch.stack(each).float().mean(0).to(each[0].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "shares.json").write_text(json.dumps(SHARES))
    return folder


def run(out: Path, model: Path, stage: dict[str, Any], seed: int) -> tuple[float, float]:
    """The geometric mean of the owners' held-out perplexities before and after a job of one stage."""
    demo = tomllib.loads((DEMO / "job.toml").read_text(encoding="utf-8"))
    clients = [
        {key: str(DEMO / value) if key == "data" else value for key, value in client.items() if key in ("name", "data", "text")}
        for client in demo["clients"]
    ]
    texts = [{**text, "path": str(DEMO / text["path"])} for text in demo["evaluate"]["data"]]
    evaluate = {"data": texts, "windows": 16, "length": 256}
    job = {"name": "shared", "seed": seed, "model": {"path": str(model)}, "clients": clients, "stages": [stage]}
    summary = api.run(Job.model_validate({**job, "evaluate": evaluate}), out, quiet=True).summary
    return statistics.geometric_mean(summary.dense.values()), statistics.geometric_mean(summary.after[0].values())


def first_use(decoder: Any, block: int, inputs: Any, before: Any) -> Any:
    """In place of :func:`fedgrove.stages.prune.shared.add_uses`: only the first block that has a weight counts."""
    names = decoder.block_names(block)
    new = {name: one for name, one in inputs.items() if names[name] not in before}
    return shared.add_uses(decoder, block, new, before)


if __name__ == "__main__":
    main()
