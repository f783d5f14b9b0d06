"""How long it takes to configure a hundred clients for a model of seven billion weights.

    .venv/bin/python bench/planner.py --write

32 blocks of 7 linears, 5 ranks, 5 batches, 3 precisions. Equal clients are solved once, so what counts is how many kinds of
client there are: kinds differ in memory, speed and uplink. The time is the processor's, on one thread, for the whole plan;
"by the program": programs that HiGHS was given, because the quick search could not prove its answer good enough.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import page

from fedgrove.rounds.capabilities import Capabilities
from fedgrove.stages.tune import cost as budget
from fedgrove.stages.tune.config import Config as TuneStage
from fedgrove.stages.tune.cost import ModelCost
from fedgrove.stages.tune.plan import TunePlan

BLOCKS, WIDTH, INNER, WORDS, LENGTH = 32, 4096, 11008, 32000, 512
CLIENTS = 100
GIB = 2**30


def sizes() -> ModelCost:
    """A Llama of seven billion weights."""
    block = dict.fromkeys(("q", "k", "v", "o"), (WIDTH, WIDTH))
    block |= {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    shapes = {f"{i}.{name}": shape for i in range(BLOCKS) for name, shape in block.items()}
    return ModelCost(shapes, 2 * WORDS * WIDTH, WIDTH, WORDS, BLOCKS, LENGTH * (12 * WIDTH + 4 * INNER), LENGTH)


def cards(kinds: int) -> dict[str, Capabilities]:
    """A hundred clients of so many kinds: 8 to 36 GiB, speed 300 to 2400, 20 to 160 Mbit/s."""
    found = {}
    for i in range(CLIENTS):
        kind = i % kinds
        step = kind * 7 / max(1, kinds - 1)
        link = int(2e7 * (1 + step))
        found[f"client-{i:03d}"] = Capabilities(
            memory=int((8 + 4 * step) * GIB), speed=300 * (1 + step), uplink=link, downlink=link, tokens=1000
        )
    return found


def configure(kinds: int, seed: int) -> tuple[float, TunePlan]:
    """Seconds of processor time, and the plan."""
    rng = random.Random(seed)
    raw = {name: rng.random() ** 3 for name in sizes().linears}
    importance = {name: value / sum(raw.values()) for name, value in raw.items()}
    begun = time.process_time()
    plan = make_plan(0, TuneStage(kind="tune"), sizes(), cards(kinds), importance)
    return time.process_time() - begun, plan


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    args = parser.parse_args()
    programs: list[int] = []
    real = budget.solve
    budget.solve = lambda *args: programs.append(1) or real(*args)
    configure(1, 0)  # imports
    rows = [
        "| kinds of client | seconds, median | each | by the program | bits given | ranks given |",
        "|---|---|---|---|---|---|",
    ]
    for kinds in (1, 2, 4, 8, CLIENTS):
        programs.clear()
        runs = [configure(kinds, seed) for seed in range(3)]
        shares = list(runs[0][1].clients.values())
        bits = ", ".join(map(str, sorted({share.bits for share in shares})))
        ranks = ", ".join(map(str, sorted({rank for share in shares for rank in share.ranks.values()})))
        times = [seconds for seconds, _ in runs]
        each = ", ".join(f"{seconds:.2f}" for seconds in times)
        rows.append(f"| {kinds} | {statistics.median(times):.2f} | {each} | {len(programs)} | {bits} | {ranks} |")
    print("\n".join(rows))
    if args.write:
        page.write("planner", "\n".join(rows))


if __name__ == "__main__":
    main()
