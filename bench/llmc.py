"""fedgrove compared with llm-compressor: same checkpoint, calibration windows and threads, each in a process of its own.

    python -m venv rival && rival/bin/pip install llmcompressor
    .venv/bin/python bench/llmc.py --rival rival/bin/python --data ../shared/data/text --write

Cost: 160 million random parameters. Runs alternate, so that a busy machine slows all alike; the table shows medians. "Whole"
is the process from start to end: imports, tokenizing, pruning, writing. "Pruning" leaves out what comes before and after it.
Memory is the process's largest resident set. Quality: perplexity on held-out text of the shipped model, which is trained,
pruned once by each tool.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import page
import shapes
import tomli_w
import torch
from arguments import existing_folder

from fedgrove.data.windows import calibration_windows, evaluation_windows
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import perplexity
from fedgrove.models.stream import Checkpoint

HERE = Path(__file__).parent
OURS = "from fedgrove.cli import main; main()"
# Starts a program from a small process, because the system counts the memory of the starting process as the program's own.
SMALL = "import resource, subprocess, sys; status = subprocess.call(sys.argv[2:])\n"
SMALL += "open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)); sys.exit(status)"
SEED = 0
RIVAL = "llm-compressor"
TOOLS: dict[str, dict[str, Any]] = {  # what the job says in addition
    "fedgrove, sequential": {"source": "sequential"},
    "fedgrove, dense": {"source": "dense"},
    "fedgrove, dense, bfloat16": {"source": "dense", "compute_dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Result:
    """What one run cost, and where its model lies."""

    whole: float
    pruning: float
    memory: int
    model: Path


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rival", type=Path, required=True, help="a Python that has llmcompressor")
    arguments.add_argument(
        "--data", type=existing_folder, required=True, help="folder with wikitext2-valid.txt and wikitext2-test.txt"
    )
    arguments.add_argument(
        "--model", type=existing_folder, help="what is timed, a model directory; default: 160 million random parameters"
    )
    arguments.add_argument("--trained", type=Path, default=shapes.TOKENIZER, help="whose perplexity is measured")
    arguments.add_argument("--dtype", default="float32", help="of the random checkpoint; the rival computes in it")
    arguments.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="compared with the rival")
    arguments.add_argument("--pruners", nargs="+", default=["sparsegpt", "wanda"])
    arguments.add_argument("--sparsity", type=float, default=0.5)
    arguments.add_argument("--samples", type=int, default=32)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    tools = [RIVAL, *given.tools]
    rows = [
        "| pruner | | whole, s | pruning, s | memory, MB | faster | of the memory | sparsity | perplexity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = given.model or shapes.make(work / "dense", "160m", shapes.TOKENIZER, getattr(torch, given.dtype))
        for pruner in given.pruners:
            results: dict[str, list[Result]] = {tool: [] for tool in tools}
            for number in range(given.runs):
                for tool in tools:
                    results[tool].append(prune(tool, model, pruner, given, work / f"{pruner}-{number}-{tools.index(tool)}"))
                    print(pruner, number, tool, results[tool][-1], file=sys.stderr, flush=True)
            worth = {tool: quality(tool, pruner, given, work / f"{pruner}-trained-{tools.index(tool)}") for tool in tools}
            rows += table(pruner, results, worth)
            print("\n".join(rows), flush=True)
    if given.write:
        page.write("llmc", "\n".join(rows))


def prune(tool: str, model: Path, pruner: str, given: argparse.Namespace, out: Path) -> Result:
    """One run of one tool."""
    text = given.data / "wikitext2-valid.txt"
    if tool == RIVAL:
        ids = calibration_windows([text], None, Checkpoint(model).tokenizer(), given.samples, given.length, f"{SEED}/0/only")
        windows = out.with_suffix(".json")
        windows.write_text(json.dumps(ids.tolist()))
        dtype = str(Checkpoint(model).config.dtype).removeprefix("torch.")
        settings = [str(model), str(out), str(windows), pruner, str(given.sparsity), dtype, str(given.threads)]
        seconds, memory, said = measure([str(given.rival), str(HERE / "llmc_rival.py"), *settings], given.threads)
        return Result(seconds, json.loads(said.splitlines()[-1])["seconds"], memory, out)
    stage = {"kind": "prune", "pruner": pruner, "sparsity": given.sparsity, **TOOLS[tool]}
    job = {
        "name": "bench",
        "seed": SEED,
        "model": {"path": str(model.resolve())},
        "clients": [{"name": "only", "data": str(text.resolve())}],
        "stages": [stage | {"samples": given.samples, "length": given.length}],
    }
    job_file = out.with_suffix(".toml")
    job_file.write_text(tomli_w.dumps(job))
    command = [sys.executable, "-c", OURS, "run", str(job_file), "--out", str(out), "--quiet"]
    seconds, memory, _ = measure(command, given.threads)
    began, ended = ((out / name).stat().st_mtime for name in ("plan-0-prune.json", "pruning.json"))
    return Result(seconds, ended - began, memory, out / "model")


def measure(command: list[str], threads: int) -> tuple[float, int, str]:
    """Seconds, largest resident set in bytes, and standard output."""
    surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.NamedTemporaryFile("r") as largest:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-S", "-c", SMALL, largest.name, *command], capture_output=True, text=True, env=surroundings
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{command[0]} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return seconds, int(largest.read()) * 1024, done.stdout


def quality(tool: str, pruner: str, given: argparse.Namespace, out: Path) -> tuple[float, float]:
    """Perplexity of the trained model, pruned, and the sparsity of its linears."""
    checkpoint = Checkpoint(prune(tool, given.trained, pruner, given, out).model)
    decoder = Decoder(checkpoint)
    zeros = [decoder.read_matrix(linear) == 0 for linear in decoder.linear_names()]
    sparsity = sum(int(zero.sum()) for zero in zeros) / sum(zero.numel() for zero in zeros)
    texts = evaluation_windows(given.data / "wikitext2-test.txt", None, checkpoint.tokenizer(), given.length, 32)
    return perplexity(decoder, texts), sparsity


def table(pruner: str, results: dict[str, list[Result]], worth: dict[str, tuple[float, float]]) -> list[str]:
    """Markdown rows: medians, and in brackets how they compare with the rival."""
    costs = {
        tool: [statistics.median(getattr(run, field) for run in runs) for field in ("whole", "pruning", "memory")]
        for tool, runs in results.items()
    }
    rows = []
    for tool, (whole, pruning, memory) in costs.items():
        surprise, sparsity = worth[tool]
        compared = ["", "", f"{surprise:.2f}"]
        if tool != RIVAL:
            theirs = costs[RIVAL]
            compared = [
                f"**{theirs[0] / whole:.2f}×**",
                f"**{memory / theirs[2]:.2f}**",
                f"{surprise:.2f} (**{surprise / worth[RIVAL][0]:.3f}**)",
            ]
        cells = [pruner, tool, f"{whole:.1f}", f"{pruning:.1f}", f"{memory / 1e6:.0f}", *compared[:2], f"{sparsity:.4f}"]
        rows.append(f"| {' | '.join(cells)} | {compared[2]} |")
    return rows


if __name__ == "__main__":
    main()
