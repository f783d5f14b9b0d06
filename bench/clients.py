"""Many clients in one simulation: time, peak of memory, and the size of the report, as their number grows.

    .venv/bin/python bench/clients.py --write

The shipped model; every client has two windows of 128 tokens of its own. Each job runs in a process of its own; time is the
processor time of that process, its peak the largest memory that it held.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import page

import fedgrove

GROVE = Path(fedgrove.__file__).parent / "demo" / "grove-6m"
LENGTH, SAMPLES = 128, 2
JOBS = {
    "prune, `pooled`, Wanda": 'kind = "prune"\npruner = "wanda"\naggregation = "pooled"\nsparsity = 0.5',
    "prune, `fedspallm`, Wanda": 'kind = "prune"\npruner = "wanda"\nsparsity = 0.5',
    "tune, LoRA, one round of two steps": 'kind = "tune"\nmethod = "lora"\nrounds = 1\nsteps = 2\nbatches = [2]\nranks = [4]',
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    arguments.add_argument("--jobs", nargs="+", help="only those whose name contains one of these words")
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    lines = ["| | clients | processor time | a client | peak | report | run folder |", "|---|---|---|---|---|---|---|"]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        for name, stage in JOBS.items():
            if given.jobs and not any(word in name for word in given.jobs):
                continue
            for number in given.clients:
                lines.append(measure(Path(folder) / f"{len(lines)}", name, stage, number))
                print(lines[-1], flush=True)
    if given.write:
        page.write("clients", "\n".join(lines))


def measure(folder: Path, name: str, stage: str, number: int) -> str:
    """A row of the table: a job with so many clients."""
    folder.mkdir()
    clients = []
    for index in range(number):
        file = folder / f"{index}.txt"
        file.write_text(" ".join(f"word {index + place}" for place in range(2 * SAMPLES * LENGTH)), encoding="utf-8")
        clients.append(f'[[clients]]\nname = "client-{index:04d}"\ndata = "{file.name}"\n')
    windows = f"length = {LENGTH}" + (f"\nsamples = {SAMPLES}" if "prune" in stage else "")
    job = f'name = "many"\n[model]\npath = "{GROVE}"\n[evaluate]\ndata = []\n[[stages]]\n{stage}\n{windows}\n'
    (folder / "job.toml").write_text(job + "".join(clients), encoding="utf-8")
    out = folder / "run"
    arguments = ["run", str(folder / "job.toml"), "--out", str(out), "--quiet"]
    command = [sys.executable, "-c", "from fedgrove.cli import main; main()", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name}: {number} clients: the run failed")
    seconds, peak = used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss
    report, stored = (out / "report.html").stat().st_size, sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    sizes = f"{peak / 2**20:.0f} MiB | {report / 1e6:.2f} MB | {stored / 1e6:.0f} MB"
    return f"| {name} | {number} | {seconds:.0f} s | {seconds / number:.2f} s | {sizes} |"


if __name__ == "__main__":
    main()
