"""How much memory pruning takes, and how its time grows with the number of blocks: a Llama of 1.1 billion random parameters.

    .venv/bin/python bench/lean.py --data ../shared/data/text --write

Client and server run in one process. Memory is the process's largest resident set, less that of a process that only imports.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import llmc
import page
import shapes
import torch
from arguments import existing_folder

IMPORTS = "import fedgrove.run; from transformers import LlamaForCausalLM"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=existing_folder, required=True, help="folder with wikitext2-valid.txt")
    arguments.add_argument("--shape", choices=shapes.SHAPES, default="1.1b")
    arguments.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 22, 32])
    arguments.add_argument("--pruner", default="sparsegpt")
    arguments.add_argument("--samples", type=int, default=4)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--tokenizer", type=Path, default=shapes.TOKENIZER)
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    given.sparsity = 0.5
    _, imports, _ = llmc.measure([sys.executable, "-c", IMPORTS], given.threads)
    rows = [
        "| blocks | parameters | file, MB | pruning, s | s per block | memory, MB | above the imports, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for blocks in given.blocks:
        with tempfile.TemporaryDirectory() as folder:
            model = shapes.make(Path(folder) / "dense", given.shape, given.tokenizer, torch.bfloat16, blocks)
            size = (model / "model.safetensors").stat().st_size
            result = llmc.prune("fedgrove, sequential", model, given.pruner, given, Path(folder) / "run")
        rows.append(
            f"| {blocks} | {size / 2e9:.2f} billion | {size / 1e6:.0f} | {result.pruning:.0f} | {result.pruning / blocks:.1f} "
            f"| {result.memory / 1e6:.0f} | {(result.memory - imports) / 1e6:.0f} |"
        )
        print(rows[-1], flush=True)
    if given.write:
        page.write("lean", "\n".join(rows))


if __name__ == "__main__":
    main()
