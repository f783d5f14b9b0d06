"""How long it takes to configure a hundred clients for a model of seven billion weights.

    .venv/bin/python bench/planner.py --write

32 blocks of 7 linears, 5 ranks, 5 batches, 3 precisions. Equal clients are solved once, so what counts is the number of kinds
of client: kinds differ in memory, speed and uplink. Times are processor time on one thread, for the whole plan. "By the
program" counts the programs that HiGHS had to solve because the quick search could not prove its solution good enough.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from unittest import mock

import page

from fedgrove.models.cost import ModelCost
from fedgrove.rounds.capabilities import Capabilities
from fedgrove.stages.tune import cost
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.plan import Plan, make_plan

BLOCKS, WIDTH, INNER, WORDS, LENGTH = 32, 4096, 11008, 32000, 512
CLIENTS = 100
GIB = 2**30


def model_cost() -> ModelCost:
    """A Llama of seven billion weights."""
    block = dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH))
    block |= {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    shapes = {f"{i}.{name}": shape for i in range(BLOCKS) for name, shape in block.items()}
    saved = LENGTH * (12 * WIDTH + 4 * INNER)
    return ModelCost(shapes, 2 * WORDS * WIDTH, WIDTH, WORDS, BLOCKS, saved, LENGTH, 2 * saved)


def capabilities(kinds: int) -> dict[str, Capabilities]:
    """A hundred clients of so many kinds: 8 to 36 GiB, speed 300 to 2400, 20 to 160 Mbit/s."""
    found = {}
    for i in range(CLIENTS):
        kind = i % kinds
        step = kind * 7 / max(1, kinds - 1)
        link = int(2e7 * (1 + step))
        found[f"client-{i:03d}"] = Capabilities(
            memory=int((8 + 4 * step) * GIB), speed=300 * (1 + step), uplink=link, downlink=link, tokens={LENGTH: 1000}
        )
    return found


def configure(kinds: int, seed: int) -> tuple[float, Plan]:
    """Seconds of processor time, and the plan."""
    rng = random.Random(seed)
    raw = {name: rng.random() ** 3 for name in model_cost().linears}
    importance = {name: value / sum(raw.values()) for name, value in raw.items()}
    begun = time.process_time()
    plan = make_plan(0, Config(kind="tune"), model_cost(), capabilities(kinds), importance)
    return time.process_time() - begun, plan


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    args = parser.parse_args()
    configure(1, 0)  # imports
    rows = [
        "| kinds of client | seconds, median | each | by the program | bits given | ranks given |",
        "|---|---|---|---|---|---|",
    ]
    for kinds in (1, 2, 4, 8, CLIENTS):
        with mock.patch.object(cost, "solve", wraps=cost.solve) as programs:
            runs = [configure(kinds, seed) for seed in range(3)]
        assignments = list(runs[0][1].clients.values())
        bits = ", ".join(map(str, sorted({assignment.bits for assignment in assignments})))
        ranks = ", ".join(map(str, sorted({rank for assignment in assignments for rank in assignment.ranks.values()})))
        times = [seconds for seconds, _ in runs]
        each = ", ".join(f"{seconds:.2f}" for seconds in times)
        rows.append(f"| {kinds} | {statistics.median(times):.2f} | {each} | {programs.call_count} | {bits} | {ranks} |")
    print("\n".join(rows))
    if args.write:
        page.write("planner", "\n".join(rows))


if __name__ == "__main__":
    main()
