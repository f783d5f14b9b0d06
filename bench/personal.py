"""Is what `personal` reports honest? The mean gain over owners whose text does not differ must not be clearly above zero.

    .venv/bin/python bench/personal.py --data ../shared/data

Three ways to deal text to eight owners: newsgroups at random (iid: there is nothing to gain), newsgroups by label (Dirichlet
0.1), and four kinds of text, two owners each with 80 % and 20 % of it. An owner chooses by one half of its held-out windows and
reports on the other; its interval is 1.96 standard errors. "worse": owners whose reported loss is above that of the shared
adapter by more than their interval.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import tune
from arguments import existing_folder
from results import Kept

from fedgrove import api
from fedgrove.files import read_lines
from fedgrove.split import split

OWNERS, MOST = 8, 2400  # records that are dealt
CASES = ("iid", "dirichlet", "kinds")
STAGE = {
    "kind": "tune", "method": "lora", "rounds": 4, "steps": 8, "length": 64, "batches": [4], "ranks": [8], "bits": [32],
    "learning_rate": 2e-3, "personal": 0.2,
}  # fmt: skip


def records_of(kind: str, data: Path) -> list[str]:
    """Texts of one kind."""
    if kind in tune.TEXTS:
        return [tune.TEXTS[kind].format(**record) for record in read_lines(data / kind / "train.jsonl")]
    words = " ".join(file.read_text(encoding="utf-8") for file in sorted((data / "text").glob(f"{kind}-train*.txt"))).split(" ")
    return [" ".join(words[start : start + 120]) for start in range(0, len(words), 120)]


def deal(case: str, data: Path, folder: Path, seed: int) -> list[Path]:
    """Each owner's file."""
    folder.mkdir()
    if case == "kinds":
        files = []
        for kind in ("medquad", "e2e", "rustbook", "shakespeare"):
            texts = records_of(kind, data)
            random.Random(f"{seed}/{kind}").shuffle(texts)
            texts = texts[: MOST // 4]
            for name, part in (("large", texts[: len(texts) * 4 // 5]), ("small", texts[len(texts) * 4 // 5 :])):
                files.append(folder / f"{kind}-{name}.jsonl")
                files[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
        return files
    lines = (data / "newsgroups" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(lines)
    source = folder / "all.jsonl"
    source.write_text("\n".join(lines[:MOST]) + "\n", encoding="utf-8")
    field = None if case == "iid" else "label"
    split(source, folder / "dealt", by=case, clients=OWNERS, field=field, alpha=0.1, held_out=0.0, seed=seed)  # type: ignore[arg-type]
    return sorted((folder / "dealt").glob("client-*.jsonl"))


def run(data: Path, case: str, pull: float, seed: int) -> dict[str, Any]:
    """What the owners report."""
    with tempfile.TemporaryDirectory() as name:
        files = deal(case, data, Path(name) / "data", seed)
        clients = [{"name": file.stem, "data": str(file), "text": "{text}"} for file in files]
        job = {"name": "personal", "seed": seed, "model": {"path": str(tune.MODEL)}, "clients": clients,
               "stages": [{**STAGE, "personal_pull": pull}]}  # fmt: skip
        done = api.run(job, Path(name) / "run", quiet=True)
        found: dict[str, dict[str, float]] = {}
        for line in read_lines(done.path / "metrics.jsonl"):
            if line["name"].startswith("personal/"):
                found.setdefault(line["name"].removeprefix("personal/"), {})[line["client"]] = line["value"]
    keeps = [client for client, own in found["keeps"].items() if own]
    gains = {client: found["shared"][client] - found["own"][client] if client in keeps else 0.0 for client in found["shared"]}
    error = math.sqrt(sum(found["error"][client] ** 2 for client in keeps)) / len(gains)
    mean = sum(gains.values()) / len(gains)
    return {
        "owners": len(gains), "keep": len(keeps), "gain": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error,
        "worst": min(gains.values()), "worse": sum(gains[client] < -1.96 * found["error"][client] for client in keeps),
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row for each run."""
    rows = [
        "| text | pull | seed | owners that keep their own | mean gain (95 %) | worst owner | worse |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        around = f"{one['gain']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})"
        keep = f"{one['keep']} of {one['owners']}"
        rows.append(
            f"| {one['case']} | {one['pull']:g} | {one['seed']} | {keep} | {around} | {one['worst']:+.4f} | {one['worse']} |"
        )
    return "\n".join(rows).replace("-0.", "−0.")


def main() -> None:
    """Runs all cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--pulls", nargs="+", type=float, default=[0.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    args = parser.parse_args()
    api.hush()
    torch.set_num_threads(1)
    wanted = [
        {"case": case, "pull": pull, "seed": seed} for pull, case, seed in itertools.product(args.pulls, args.cases, args.seeds)
    ]
    kept = Kept(args.results, tune.MODEL)
    print(table([{**one, **kept(functools.partial(run, args.data, **one), **one)} for one in wanted]))


if __name__ == "__main__":
    main()
