"""Owners of several kinds of text: what a pool of adapters gives each of them, beside one adapter for all and one of its own.

    .venv/bin/python bench/pool.py --data ../shared/data --results pool.jsonl

*kinds*: eight owners, two each of MedQuAD, E2E, the Rust book and Shakespeare, with 80 % and 20 % of its text. *iid*: the same
text dealt at random. *mixed*: the same text of four owners who have each kind, in unequal parts (Dirichlet 0.5). *newsgroups*:
posts of twenty groups, dealt to eight owners by group (Dirichlet 0.1 or 0.3). A fifth of every owner's records is held out
before anything is trained, and on that fifth it is measured. Every method has the same start, windows and optimizer steps.
"shared, then alone": half of the rounds together, and then each owner goes on alone. A gate finds the number of members if it
can; "4 members": that many. "rank 2": members of a quarter of the rank, so that four of them are as large as one adapter. With
a pool, an owner has the mixture that its own training text gets: by its windows of each member. "each window": every held-out
window has the mixture that the gate gives for its first tokens (the pool's ``prefix``). The interval is a paired bootstrap over
each owner's windows; a gain is negative.

    .venv/bin/python bench/pool.py --data ../shared/data --leave-out --pools pools --methods "keys, 4 members"

Each owner of *kinds* is left out once, and gets a mixture of the others' pool by `adopt`: only forward passes, besides training
the pools, which stay in the folder ``--pools`` and are trained once. "shuffled keys": the mixture that the gate gives when its
keys have changed places; what the gate gains has to be lost with it. With ``--together pair`` two owners of different kinds are
left out at a time, so that half as many pools are trained; with ``--together kind`` the two of a kind, so that their text is
like nothing that the pool knows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import page
import personal
import results
import torch
import tune
from arguments import existing_folder

from fedgrove import api
from fedgrove.adopt import adopt
from fedgrove.data.windows import training_windows
from fedgrove.files import read_lines
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.options import By
from fedgrove.split import by_dirichlet
from fedgrove.stages.tune.frozen import load
from fedgrove.stages.tune.personal import losses
from fedgrove.stages.tune.pool.features import STATE
from fedgrove.stages.tune.pool.finished import Pool
from fedgrove.stages.tune.pool.newcomers import few_windows

LENGTH = 64
RECORDS, MEASURED = 320, 40  # records of each kind; held-out windows of each owner that are measured at most
ROUNDING = 1e-3  # nats: one adapter for all is measured merged into bfloat16 weights, a member of a pool beside them
FEWEST = 10  # records of an owner: with fewer there is none to hold out and train on
STAGE = {
    "kind": "tune", "planner": "uniform", "parametrization": "lora", "aggregation": "ffa_lora", "rounds": 6, "steps": 8,
    "length": LENGTH, "batches": [4], "ranks": [8], "bits": [32], "learning_rate": 4e-3,
}  # fmt: skip
KINDS = ("medquad", "e2e", "rustbook", "shakespeare")
OWNERS = tuple(f"{kind}-{size}" for kind in KINDS for size in ("large", "small"))
TOGETHER = {  # owners who are left out at the same time
    "pair": (
        {"medquad-large", "e2e-small"}, {"medquad-small", "e2e-large"},
        {"rustbook-large", "shakespeare-small"}, {"rustbook-small", "shakespeare-large"},
    ),
    "kind": tuple({f"{kind}-large", f"{kind}-small"} for kind in KINDS),
}  # fmt: skip
TOGETHER_FIRST = "shared, then alone"
METHODS = (
    "base", "shared", "alone", TOGETHER_FIRST, "groups", "random", "losses", "mixture", "similar", "keys", "user_centric",
    "mixture, 4 members", "similar, 4 members", "keys, 4 members", "keys, 4 members, rank 2",
    "keys, 4 members, each window", "mixture, 4 members, each window",
)  # fmt: skip
ALPHAS = {"mixed": (4, 0.5), "newsgroups 0.1": (8, 0.1), "newsgroups 0.3": (8, 0.3)}  # owners, and how evenly labels are dealt
CASES = ("kinds", "iid", *ALPHAS)
Parts = dict[str, list[tuple[float, int]]]  # by owner, the loss of each held-out window and its predicted tokens


def deal(case: str, data: Path, folder: Path, seed: int) -> dict[str, tuple[Path, Path]]:
    """By owner, the file that it trains on and the one that it holds out."""
    folder.mkdir()
    texts: dict[str, list[str]] = {}
    if case in ALPHAS:
        labels, every = zip(*_labeled(case, data, seed), strict=True)
        number, alpha = ALPHAS[case]
        dealt = by_dirichlet(range(len(every)), labels, number, alpha, np.random.default_rng(seed))
        for which, part in enumerate(dealt):
            lines = [every[i] for i in part]
            random.Random(f"{seed}/{which}").shuffle(lines)
            if len(lines) >= FEWEST:
                texts[f"owner-{which}"] = lines
    else:
        for kind in KINDS:
            of_kind = records(kind, data, seed)
            texts[f"{kind}-large"], texts[f"{kind}-small"] = of_kind[: RECORDS * 4 // 5], of_kind[RECORDS * 4 // 5 :]
    if case == "iid":
        every = [line for lines in texts.values() for line in lines]
        random.Random(f"{seed}/iid").shuffle(every)
        cuts = iter(every)
        texts = {f"owner-{number}": list(itertools.islice(cuts, len(lines))) for number, lines in enumerate(texts.values())}
    found = {}
    for owner, lines in texts.items():
        number = len(lines) // 5
        for name, part in (("held", lines[:number]), ("train", lines[number:])):
            (folder / f"{name}-{owner}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
        found[owner] = folder / f"train-{owner}.jsonl", folder / f"held-{owner}.jsonl"
    return found


def records(kind: str, data: Path, seed: int) -> list[str]:
    """Lines of a file of one kind of text, in random order."""
    found = [json.dumps({"text": text}) for text in personal.records_of(kind, data)]
    random.Random(f"{seed}/{kind}").shuffle(found)
    return found[:RECORDS]


def _labeled(case: str, data: Path, seed: int) -> list[tuple[str, str]]:
    """Each record's label, by which it is dealt, and its line."""
    if case == "mixed":
        return [(kind, line) for kind in KINDS for line in records(kind, data, seed)]
    rows = read_lines(data / "newsgroups" / "train.jsonl")
    random.Random(seed).shuffle(rows)
    return [(row["label"], json.dumps({"text": row["text"]})) for row in rows[: RECORDS * len(KINDS)]]


def run(data: Path, model: Path, case: str, method: str, seed: int, **changes: Any) -> dict[str, Any]:
    """The losses of every owner's own text, and the bytes of the ledger."""
    with tempfile.TemporaryDirectory() as name:
        files = deal(case, data, Path(name) / "data", seed)
        train = functools.partial(_train, Path(name), seed=seed, changes=changes)
        measure = functools.partial(_measure, tokenizer=_tokenizer(model))
        if method == "base":
            return {"parts": {owner: measure(model, held) for owner, (_, held) in files.items()}, "bytes": 0}
        if method in ("alone", TOGETHER_FIRST):
            start, sent = model, 0
            if method == TOGETHER_FIRST:
                rounds = int(changes.get("rounds", STAGE["rounds"]))
                first = _train(Path(name), "shared", model, files, seed=seed, changes={**changes, "rounds": rounds // 2})
                start, sent = first / "model", _sent(first)
                train = functools.partial(train, changes={**changes, "rounds": rounds - rounds // 2})
            runs = {owner: train(owner, start, {owner: of}) for owner, of in files.items()}
            parts = {owner: measure(runs[owner] / "model", held) for owner, (_, held) in files.items()}
            return {"parts": parts, "bytes": sent}
        if method == "shared":
            done = train("shared", model, files)
            return {
                "parts": {owner: measure(done / "model", held) for owner, (_, held) in files.items()},
                "bytes": _sent(done),
            }
        if "rank 2" in method:
            train = functools.partial(train, changes={**changes, "ranks": [2]})
        done = train("pool", model, files, _pool(method, list(files)))
        pool = Pool.read(done)
        decoder = pool.model()
        parts = {}
        for owner, (_, held) in files.items():
            windows = pool.facts["clients"][owner]
            weights = [number / sum(windows) for number in windows]
            with torch.no_grad():
                ids, labels = _windows(held, _tokenizer(model))
                if "each window" in method:
                    mixtures = [pool.mix(of) for of in pool.look(decoder, list(ids))[0].tolist()]
                    one_by_one = zip(mixtures, ids.split(1), labels.split(1), strict=True)
                    parts[owner] = [pool.losses(decoder, mixed, (one, label))[0] for mixed, one, label in one_by_one]
                else:
                    parts[owner] = pool.losses(decoder, pool.mix(weights), (ids, labels))
        return {"parts": parts, "bytes": _sent(done), "windows": pool.facts["clients"], "fit": pool.facts.get("likelihoods")}


def leave_out(
    data: Path, model: Path, pools: Path, method: str, seed: int, owner: str, together: str | None = None, **changes: Any
) -> dict[str, Any]:
    """What an owner of *kinds* gets from a pool of the others, which is trained if it is not there; then forward passes only.

    Args:
        together: which other owner the pool was trained without, either; a key of ``TOGETHER``.

    Returns:
        Its loss by way: without an adapter, with the shared one, with the mixture of the gate, of the gate with its keys
        shuffled, and with the best member by losses. Of ``adopt`` by "gate" and "losses" its choice, forward passes, seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = deal("kinds", data, folder / "data", seed)
        train, held = files[owner]
        out = next(owners for owners in TOGETHER[together] if owner in owners) if together else {owner}
        files = {name: of for name, of in files.items() if name not in out}
        settings = json.dumps([results.fingerprint(model), method, seed, sorted(out), changes], sort_keys=True)
        kept = pools / hashlib.sha256(settings.encode()).hexdigest()[:16]
        if not (kept / "pool").is_dir():
            done = _train(folder, method, model, files, _pool(method, list(files)), seed=seed, changes=changes)
            shutil.copytree(done / "pool", kept / "pool")
        pool, tokenizer = Pool.read(kept), _tokenizer(model)
        decoder = pool.model(str(model))
        weights: dict[str, Sequence[float]] = {"none": (), "shared": pool.shares}
        found: dict[str, Any] = {"forwards": {}, "seconds": {}, "choice": {}}
        for by in By if pool.gate else (By.losses,):
            got = adopt(kept, [train], folder / by, by=by, text="{text}", model=str(model))
            found["forwards"][by], found["seconds"][by], found["choice"][by] = got.forwards, got.seconds, got.choice
            found["unlike"] = found.get("unlike", got.unlike)
            weights[by] = got.weights if by is By.losses else _weights(pool, decoder, train)
        if pool.gate:
            weights["shuffled keys"] = _weights(_shuffled(pool), decoder, train)
        with torch.no_grad():
            parts = {
                way: pool.losses(decoder, pool.mix(of) if of else {}, _windows(held, tokenizer)) for way, of in weights.items()
            }
        return {**found, "losses": means(parts), "weights": {way: list(of) for way, of in weights.items()}}


def _weights(pool: Pool, decoder: Decoder, train: Path) -> list[float]:
    """The mixture that the gate gives, whatever it is worth."""
    ids, _ = few_windows([train], {"text": "{text}", "prompt": None, "answer": None}, decoder.checkpoint.tokenizer(), LENGTH)
    with torch.no_grad():
        found: list[float] = pool.look(decoder, list(ids))[0].mean(0).tolist()
    return found


def _shuffled(pool: Pool) -> Pool:
    """The same pool, with each key at the next member."""
    state = {name: value.roll(1, 1) for name, value in pool.gate.items() if name.startswith(STATE)}
    return dataclasses.replace(pool, gate=pool.gate | state)


def _pool(method: str, owners: list[str]) -> dict[str, Any]:
    pool: dict[str, Any] = {"gate": method.partition(",")[0]}
    if method == "groups":
        kinds = sorted({owner.partition("-")[0] for owner in owners})
        pool["groups"] = {kind: [owner for owner in owners if owner.startswith(f"{kind}-")] for kind in kinds}
    elif "4 members" in method:
        pool["members"] = 4
    return pool


def _train(
    folder: Path,
    name: str,
    model: Path,
    files: dict[str, tuple[Path, Path]],
    pool: dict[str, Any] | None = None,
    *,
    seed: int,
    changes: dict[str, Any],
) -> Path:
    stage = {**STAGE, **{key: value for key, value in changes.items() if key in STAGE}}
    stage = {key: value for key, value in stage.items() if value is not None}  # such as ranks of (IA)³, which has none
    more = {key: value for key, value in changes.items() if key not in STAGE}
    job = {
        "name": "pool", "seed": seed, "model": {"path": str(model)}, "privacy": {"min_group": 2},
        "clients": [{"name": owner, "data": str(file), "text": "{text}"} for owner, (file, _) in files.items()],
        "stages": [stage if pool is None else {**stage, "pool": {**pool, **more}}],
    }  # fmt: skip
    return api.run(job, folder / f"run-{name}", quiet=True).path


def _sent(done: Path) -> int:
    return sum(line["bytes"] for line in read_lines(done / "ledger.jsonl") if line["direction"] == "up")


@functools.cache
def _tokenizer(model: Path) -> Any:
    return Checkpoint(model).tokenizer()


def _windows(file: Path, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = training_windows([file], {"text": "{text}"}, tokenizer, LENGTH)
    return ids[:MEASURED], labels[:MEASURED]


def _measure(model: Path, held: Path, tokenizer: Any) -> list[tuple[float, int]]:
    return losses(load(Decoder(Checkpoint(model)), 32), _windows(held, tokenizer))


def means(parts: Parts) -> dict[str, float]:
    """Each owner's loss per token."""
    return {owner: sum(loss for loss, _ in of) / sum(count for _, count in of) for owner, of in parts.items()}


def gain(parts: Parts, other: Parts) -> tuple[float, float, float]:
    """The mean over owners of a loss minus another one, and its 95 % interval (2,000 draws of every owner's windows)."""
    rng = np.random.default_rng(0)
    drawn = []
    for owner, of in sorted(parts.items()):
        apart = np.array([one[0] - two[0] for one, two in zip(of, other[owner], strict=True)])
        counts = np.array([one[1] for one in of])
        picked = rng.integers(len(of), size=(2000, len(of)))
        drawn.append(apart[picked].sum(1) / counts[picked].sum(1))
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    ours, theirs = means(parts), means(other)
    return sum(ours[owner] - theirs[owner] for owner in ours) / len(ours), float(low), float(high)


def table(found: dict[tuple[str, int, str], dict[str, Any]]) -> str:
    """Markdown: a row for each case and method, with the values of the seeds; "for sure": in how many 95 % say better."""
    rows = [
        "| text | method | mean loss | worst owner | minus shared | better for sure | MB up |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, method in dict.fromkeys((case, method) for case, _, method in found):
        of = {seed: one for (*which, seed, name), one in found.items() if (which, name) == ([case], method)}
        losses_of = [means(one["parts"]) for one in of.values()]
        mean = sum(sum(one.values()) / len(one) for one in losses_of) / len(of)
        worst = sum(max(one.values()) for one in losses_of) / len(of)
        apart = sure = ""
        if method != "shared" and all((case, seed, "shared") in found for seed in of):
            gains = [gain(one["parts"], found[case, seed, "shared"]["parts"]) for seed, one in of.items()]
            apart = ", ".join(f"{middle:+.3f}" for middle, _, _ in gains)
            sure = f"{sum(high < -ROUNDING for *_, high in gains)} of {len(gains)}"
        sent = sum(one["bytes"] for one in of.values()) / len(of) / 1e6
        rows.append(f"| {case} | {method} | {mean:.3f} | {worst:.3f} | {apart} | {sure} | {sent:.1f} |")
    return "\n".join(rows).replace("-0.", "−0.")


def table_of_newcomers(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each owner who was left out, and a line of how many are better off than with the shared adapter."""
    first = next(iter(found.values()))
    ways = [way for way in ("none", "shared", "gate", "shuffled keys", "losses") if way in first["losses"]]
    by = "gate" if "gate" in first["choice"] else "losses"
    rows = [f"| owner left out | {' | '.join(ways)} | choice | forward passes | seconds |"]
    rows += ["|---" * (len(ways) + 4) + "|"]
    for owner, of in found.items():
        numbers = " | ".join(f"{of['losses'][way]:.3f}" for way in ways)
        rows.append(f"| {owner} | {numbers} | {of['choice'][by]} | {of['forwards'][by]} | {of['seconds'][by]:.1f} |")
    if first["unlike"] is not None:
        unlike = sum(of["unlike"] for of in found.values()) / len(found)
        rows += [
            "",
            f"- windows that are like nothing in the pool: {unlike:.0%} in the mean (5 % expected of text that it knows)",
        ]
    for way in ways[2:]:
        gains = [of["losses"]["shared"] - of["losses"][way] for of in found.values()]
        better, mean = sum(gain > 0 for gain in gains), sum(gains) / len(gains)
        rows.append(f"- {way}: better than shared for {better} of {len(gains)} owners, by {mean:+.3f} nats in the mean")
    return "\n".join(rows).replace("-0.", "−0.")


def main() -> None:
    """Runs what is not in the file of results, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True)
    parser.add_argument("--cases", nargs="+", default=["kinds"], choices=CASES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--changes", type=json.loads, default={}, help="keys of the stage, or else of its pool, as JSON")
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    parser.add_argument("--model", type=existing_folder, default=tune.MODEL)
    parser.add_argument(
        "--leave-out",
        nargs="*",
        choices=OWNERS,
        help="owners of kinds who come after the run, one at a time; none: all",
    )
    parser.add_argument("--together", choices=TOGETHER, help="with --leave-out: two owners at a time")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md, too")
    parser.add_argument("--pools", type=Path, help="where the pools of --leave-out are kept")
    args = parser.parse_args()
    api.hush()
    torch.set_num_threads(1)
    kept = results.Kept(args.results, args.model)
    found = {}
    if args.leave_out is not None:
        for seed, method in itertools.product(args.seeds, args.methods):
            of_owners = {}
            for owner in args.leave_out or OWNERS:
                settings = {"method": method, "seed": seed, "owner": owner, "together": args.together, **args.changes}
                measure = functools.partial(leave_out, args.data, args.model, args.pools, **settings)
                of_owners[owner] = kept(measure, leave_out=True, **settings)
            text = table_of_newcomers(of_owners)
            print(text)
            if args.write:
                page.write("newcomers", text)
        return
    for case, seed, method in itertools.product(args.cases, args.seeds, args.methods):
        if method == "groups" and case != "kinds":
            continue  # nobody knows them
        settings = {"case": case, "method": method, "seed": seed, **args.changes}
        found[case, seed, method] = kept(functools.partial(run, args.data, args.model, **settings), **settings)
    text = table(found)
    print(text)
    if args.write:
        page.write("pools" if args.cases == ["kinds"] else "other-pools", text)


if __name__ == "__main__":
    main()
