"""fedgrove beside llm-compressor: same checkpoint, same calibration windows, same threads, each in a process of its own.

    python -m venv rival && rival/bin/pip install llmcompressor
    .venv/bin/python bench/llmc.py --rival rival/bin/python --data ../shared/data/text --write

Runs alternate, so that a busy machine slows both; the table holds medians. "Whole" is the process from start to end: imports,
tokenising, pruning, writing. "Pruning" leaves out what lies before and after it. Memory is the process's largest resident set.
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

import page
import shapes
import tomli_w
import torch

from fedgrove.data import calibration_windows, evaluation_windows
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import perplexity
from fedgrove.models.stream import Checkpoint

HERE = Path(__file__).parent
OURS = "from fedgrove.cli import main; main()"
SEED = 0


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
    arguments.add_argument("--data", type=Path, required=True, help="folder with wikitext2-valid.txt and wikitext2-test.txt")
    arguments.add_argument("--model", type=Path, help="a model directory; default: 160 million random parameters")
    arguments.add_argument("--tokenizer", type=Path, default=shapes.TOKENIZER, help="for the model of random parameters")
    arguments.add_argument("--dtype", default="bfloat16", help="of the checkpoint; both compute in it")
    arguments.add_argument(
        "--source", choices=["sequential", "dense"], default="sequential", help="fedgrove's; see the job file"
    )
    arguments.add_argument("--pruners", nargs="+", default=["sparsegpt", "wanda"])
    arguments.add_argument("--sparsity", type=float, default=0.5)
    arguments.add_argument("--samples", type=int, default=32)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    rows = [
        "| pruner | | whole, s | pruning, s | memory, MB | sparsity | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = given.model or shapes.make(work / "dense", "160m", given.tokenizer, getattr(torch, given.dtype))
        text = given.data / "wikitext2-valid.txt"
        windows = calibration_windows(
            [text], None, Checkpoint(model).tokenizer(), given.samples, given.length, f"{SEED}/0/only"
        )
        (work / "windows.json").write_text(json.dumps(windows.tolist()))
        held_out = given.data / "wikitext2-test.txt"
        for pruner in given.pruners:
            ours, theirs = [], []
            for number in range(given.runs):
                out = work / f"{pruner}-{number}"
                theirs.append(run_theirs(given, model, work / "windows.json", pruner, Path(f"{out}-theirs")))
                ours.append(run_ours(given, model, text, pruner, Path(f"{out}-ours")))
                print(pruner, number, theirs[-1], ours[-1], file=sys.stderr, flush=True)
            rows += table(pruner, theirs, ours, held_out, given.length)
            print("\n".join(rows), flush=True)
    if given.write:
        page.write("llmc", "\n".join(rows))


def run_ours(given: argparse.Namespace, model: Path, text: Path, pruner: str, out: Path) -> Result:
    job = {
        "name": "bench",
        "seed": SEED,
        "model": {"path": str(model.resolve())},
        "clients": [{"name": "only", "data": str(text.resolve())}],
        "stages": [
            {
                "kind": "prune",
                "pruner": pruner,
                "sparsity": given.sparsity,
                "source": given.source,
                "samples": given.samples,
                "length": given.length,
            }
        ],
    }
    job_file = out.with_suffix(".toml")
    job_file.write_text(tomli_w.dumps(job))
    command = [sys.executable, "-c", OURS, "run", str(job_file), "--out", str(out), "--quiet"]
    seconds, memory, _ = measure(command, given.threads)
    began, ended = ((out / name).stat().st_mtime for name in ("plan-0-prune.json", "pruning.json"))
    return Result(seconds, ended - began, memory, out / "model")


def run_theirs(given: argparse.Namespace, model: Path, windows: Path, pruner: str, out: Path) -> Result:
    script = str(HERE / "llmc_rival.py")
    settings = [str(model), str(out), str(windows), pruner, str(given.sparsity), given.dtype, str(given.threads)]
    seconds, memory, said = measure([str(given.rival), script, *settings], given.threads)
    return Result(seconds, json.loads(said.splitlines()[-1])["seconds"], memory, out)


def measure(command: list[str], threads: int) -> tuple[float, int, str]:
    """Seconds, largest resident set in bytes, and what it said."""
    surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, env=surroundings)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command[0]} ended with status {process.returncode}")
        said.seek(0)
        return seconds, usage.ru_maxrss * 1024, said.read()


def table(pruner: str, theirs: list[Result], ours: list[Result], held_out: Path, length: int) -> list[str]:
    rows, numbers = [], []
    for name, results in (("llm-compressor", theirs), ("fedgrove", ours)):
        whole, pruning, memory = (
            statistics.median(getattr(result, field) for result in results) for field in ("whole", "pruning", "memory")
        )
        checkpoint = Checkpoint(results[-1].model)
        decoder = Decoder(checkpoint)
        zeros = [decoder.read_matrix(linear) == 0 for linear in decoder.linear_names()]
        sparsity = sum(int(zero.sum()) for zero in zeros) / sum(zero.numel() for zero in zeros)
        texts = evaluation_windows(held_out, None, checkpoint.tokenizer(), length, 8)
        surprise = perplexity(decoder, texts)
        numbers.append((whole, pruning, memory, surprise))
        rows.append(
            f"| {pruner} | {name} | {whole:.1f} | {pruning:.1f} | {memory / 1e6:.0f} | {sparsity:.4f} | {surprise:.2f} |"
        )
    (whole, pruning, memory, surprise), mine = numbers
    rows.append(
        f"| | ratio | **{whole / mine[0]:.2f}** | **{pruning / mine[1]:.2f}** | **{mine[2] / memory:.2f}** | "
        f"| **{mine[3] / surprise:.3f}** |"
    )
    return rows


if __name__ == "__main__":
    main()
