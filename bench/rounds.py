"""Federated averaging of LoRA adapters in fedgrove, in a plain peft loop, and in Flower's simulation.

    python -m venv flower && flower/bin/pip install "flwr[simulation]" torch transformers peft
    .venv/bin/python bench/rounds.py --data ../shared/data --model smollm2 --flower flower/bin/python --write

Four clients, the same windows in the same batches, LoRA of rank 8 in every linear of the blocks, AdamW; frozen weights in
float32, or in bfloat16 where a row says so. Each tool is a process of its own, from start to the saved adapter. Runs
alternate, so that a busy machine slows all alike; the table shows medians. Memory is the largest sum over the tool's
processes (proportional set size: shared pages count once). The loss is that of the adapter on held-out text of the four
clients, measured by one program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import owners
import page
import psutil
import tomli_w
import torch
from arguments import existing_folder
from llmc import OURS

from fedgrove.data.sources import DEFAULT_TEMPLATE
from fedgrove.data.windows import evaluation_windows, training_windows
from fedgrove.models.perplexity import nll_of_logits
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.tune.training import draw

HERE = Path(__file__).parent
CLIENTS = ("medquad", "pubmedqa", "rust", "shakespeare")
RANK, RATE = 8, 1e-3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=existing_folder, required=True, help="the folder with the owners' texts")
    arguments.add_argument("--model", type=existing_folder, default=owners.GROVE)
    arguments.add_argument("--flower", type=Path, help="a Python that has flwr, ray, torch, transformers and peft")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=2)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--length", type=int, default=128)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--memory", help="a clients' memory, such as '1800 MiB': fedgrove runs with it, too")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = dict(owners.plain_files(given.data, work))
        batches = work / "batches.json"
        batches.write_text(json.dumps({client: batches_of(files[client], client, given) for client in CLIENTS}))
        settings = [str(given.model.resolve()), str(batches), str(given.rounds), str(given.threads)]
        tools = {}
        for bits, named in ((32, ""), (16, ", bfloat16")):
            ours = [sys.executable, "-c", OURS, "run", "--quiet"]
            tools[f"fedgrove{named}"] = [*ours, str(job_file(files, given, work, bits)), "--out"]
            if given.memory:
                limited = f"fedgrove{named}, clients with {given.memory}"
                tools[limited] = [*ours, str(job_file(files, given, work, bits, given.memory)), "--out"]
            tools[f"plain peft loop{named}"] = [sys.executable, str(HERE / "rounds_peft.py"), *settings, str(bits)]
        if given.flower:
            tools["Flower's simulation"] = [str(given.flower), str(HERE / "rounds_flower.py"), *settings, "32"]
        costs: dict[str, list[tuple[float, int]]] = {tool: [] for tool in tools}
        for number, (tool, command) in itertools.product(range(given.runs), tools.items()):
            costs[tool].append(measure([*command, str(work / f"{tool}-{number}")], given.threads))
            print(tool, costs[tool][-1], file=sys.stderr, flush=True)
        losses = {tool: loss(adapter_of(work / f"{tool}-0"), files, given) for tool in tools}
    rows = [
        "| | seconds | of the plain loop's | memory, MB | of the plain loop's | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    middle = {tool: [statistics.median(column) for column in zip(*runs, strict=True)] for tool, runs in costs.items()}
    plain = middle["plain peft loop"]
    for tool, (seconds, memory) in middle.items():
        ratios = f"{seconds / plain[0]:.2f} | {memory / 1e6:.0f} | {memory / plain[1]:.2f}"
        rows.append(f"| {tool} | {seconds:.1f} | {ratios} | {losses[tool]:.4f} |")
    text = "\n".join(rows)
    print(text)
    if given.write:
        page.write("rounds", text)


def batches_of(file: Path, client: str, given: argparse.Namespace) -> list[list[list[int]]]:
    """The token ids of every batch that fedgrove's client trains on, in all rounds."""
    tokenizer = Checkpoint(given.model).tokenizer()
    ids, labels = training_windows([file], {"text": DEFAULT_TEMPLATE}, tokenizer, given.length)
    drawn = draw(ids, labels, given.batch, 0, f"0/0/{client}")
    return [batch.tolist() for batch, _ in itertools.islice(drawn, given.rounds * given.steps)]


def job_file(files: dict[str, Path], given: argparse.Namespace, work: Path, bits: int, memory: str | None = None) -> Path:
    stage = {
        "kind": "tune", "method": "lora", "aggregation": "fedit", "rounds": given.rounds, "steps": given.steps,
        "length": given.length, "batches": [given.batch], "ranks": [RANK], "bits": [bits], "alpha": 2 * RANK,
        "learning_rate": RATE, "precision": "float32",
    }  # fmt: skip
    limit = {"memory": memory} if memory else {}
    job: dict[str, Any] = {
        "name": "rounds",
        "model": {"path": str(given.model.resolve()), "dtype": "float32" if bits == 32 else "bfloat16"},
        "clients": [{"name": client, "data": str(files[client]), **limit} for client in CLIENTS],
        "stages": [stage],
    }
    file = work / f"job-{bits}-{memory}.toml"
    file.write_text(tomli_w.dumps(job), encoding="utf-8")
    return file


def measure(command: list[str], threads: int) -> tuple[float, int]:
    """Seconds, and the largest sum of the proportional set sizes of the process and its children, in bytes."""
    surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said, stderr=said, env=surroundings) as process:
        whole = psutil.Process(process.pid)
        largest = 0
        while process.poll() is None:
            largest = max(largest, memory_of(whole))
            time.sleep(0.25)
        seconds = time.perf_counter() - began
        if process.returncode:
            said.seek(0)
            sys.exit(f"{command[:2]} ended with status {process.returncode}: {said.read()[-2000:]}")
    return seconds, largest


def memory_of(process: psutil.Process) -> int:
    total = 0
    for one in (process, *children(process)):
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue  # it ended
    return total


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def adapter_of(out: Path) -> Path:
    """A run folder of fedgrove has it in a folder of its own."""
    return out / "adapter" if (out / "adapter").is_dir() else out


def loss(adapter: Path, files: dict[str, Path], given: argparse.Namespace) -> float:
    """Nats per token on held-out text of the clients, of the base model with an adapter of any tool."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = Checkpoint(given.model).tokenizer()
    each = []
    for client in CLIENTS:
        windows = evaluation_windows(files[f"{client}-heldout"], DEFAULT_TEMPLATE, tokenizer, 512, 2)
        total, count = nll_of_logits(lambda ids: model(input_ids=ids.long()).logits, windows)
        each.append(total / count)
    assert all(map(math.isfinite, each))
    return statistics.mean(each)


if __name__ == "__main__":
    main()
