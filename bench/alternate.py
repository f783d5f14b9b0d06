"""Owners without labels and one with them (DualAdapt): tuning on unlabeled text and on labels, in turn.

    .venv/bin/python bench/alternate.py --data ../shared/data --results alternate.jsonl

The label is the type of a question in MedQuAD, the text the first 48 tokens of its answer, and every owner has the answers of
one web site. One site has labels ("the labeled owner"); the others tune on their text alone. Measured is the loss of the label,
and how often it is the likeliest one, on a third of the others' records, which nobody tunes on. All ways take as many steps on
labels:

- "labels": rounds with the labeled owner alone;
- "text, labels": before them as many rounds with the others;
- "in turn": half of the rounds each, twice;
- "own text, labels": a control: before them as many rounds on the labeled owner's text, without its labels.

The interval is a paired bootstrap over records. One thread.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import guesses
import results
import torch
import tune
from arguments import existing_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedgrove import api
from fedgrove.evaluation.metrics import interval, resampled
from fedgrove.models.labels import score_labels

SITES = ("GARD", "GHR", "NIDDK")  # that have labels in turn
MEASURED = 20  # records of each owner
TOKENS, LENGTH = 48, 64
STAGE = {
    "kind": "tune", "planner": "uniform", "method": "lora", "ranks": [8], "bits": [32], "batches": [4], "length": LENGTH,
    "learning_rate": 4e-3, "steps": 16,
}  # fmt: skip
ROUNDS = 4
WAYS: dict[str, list[tuple[str, int]]] = {  # whose rounds, and how many
    "labels": [("labels", ROUNDS)],
    "text, labels": [("text", ROUNDS), ("labels", ROUNDS)],
    "in turn": [("text", ROUNDS // 2), ("labels", ROUNDS // 2)] * 2,
    "own text, labels": [("own text", ROUNDS), ("labels", ROUNDS)],
}


def measure(
    data: Path, model: Path, site: str, way: str, seed: int, rounds: float = 1.0, rate: float | None = None
) -> dict[str, Any]:
    """By record of the others: the loss of its label, and whether it is the likeliest.

    Args:
        rounds: a factor of the rounds, for a try.
        rate: the learning rate; None: that of ``STAGE``.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    records = guesses.answers(data)
    for one in records:
        one["text"] = tokenizer.decode(tokenizer(one["text"], add_special_tokens=False).input_ids[:TOKENS])
    types = Counter(one["label"] for one in records if one["source"] == site)
    labels = sorted(label for label, number in types.items() if number >= guesses.FEWEST_OF_LABEL)
    with tempfile.TemporaryDirectory() as name:
        folder, held, others = Path(name), [], []
        for source in sorted({one["source"] for one in records}):
            own = [one for one in records if one["source"] == source and one["label"] in labels]
            random.Random(f"{seed}/{source}").shuffle(own)
            if source != site:
                if len(own) < guesses.FEWEST:
                    continue
                held += own[: len(own) // 3][:MEASURED]
                own = own[len(own) // 3 :]
                others.append(source)
            (folder / f"{source}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own), encoding="utf-8")
        clients = [{"name": source, "data": str(folder / f"{source}.jsonl"), "text": "{text}"} for source in (*others, site)]
        labeled = {"prompt": "{text}\nType:", "answer": " {label}"}
        clients.append({"name": f"{site}-labels", "data": str(folder / f"{site}.jsonl"), **labeled})
        whose = {"text": others, "own text": [site], "labels": [f"{site}-labels"]}
        stage = STAGE if rate is None else {**STAGE, "learning_rate": rate}
        job = {
            "name": "alternate", "seed": seed, "model": {"path": str(model)}, "clients": clients,
            "stages": [{**stage, "rounds": max(1, round(rounds * n)), "clients": whose[who]} for who, n in WAYS[way]],
        }  # fmt: skip
        tuned = AutoModelForCausalLM.from_pretrained(api.run(job, folder / "run", quiet=True).model, dtype=torch.float32).eval()
        prompts = [f"{one['text']}\nType:" for one in held]
        scores = score_labels(tuned, tokenizer, prompts, [f" {label}" for label in labels], LENGTH + 16)
        truth = torch.tensor([labels.index(one["label"]) for one in held])
        return {
            "losses": (-scores.gather(1, truth[:, None])[:, 0]).tolist(),
            "right": (scores.argmax(1) == truth).tolist(),
            "owners": len(others),
            "labels": len(labels),
        }


def table(found: dict[tuple[str, int, str], dict[str, Any]]) -> str:
    """Markdown: a row for each site, seed and way."""
    rows = [
        "| labeled | seed | way | loss of the label | minus that of labels alone (95 %) | right |",
        "|---|---|---|---|---|---|",
    ]
    for (site, seed, way), of in found.items():
        apart = ""
        if way != "labels" and (alone := found.get((site, seed, "labels"))):
            means = resampled([{key: [(loss, 1.0) for loss in one["losses"]] for key, one in (("of", of), ("alone", alone))}])
            low, high = interval(means["of"] - means["alone"])
            apart = f"{mean(of['losses']) - mean(alone['losses']):+.3f} ({low:+.3f} to {high:+.3f})"
        rows.append(f"| {site} | {seed} | {way} | {mean(of['losses']):.3f} | {apart} | {mean(of['right']):.1%} |")
    return "\n".join(rows).replace("-0.", "−0.").replace("-1.", "−1.").replace("-2.", "−2.")


def main() -> None:
    """Runs what is not in the file of results, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with medquad")
    parser.add_argument("--sites", nargs="+", default=list(SITES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=float, default=1.0, help="a factor of the rounds, for a try")
    parser.add_argument("--rate", type=float, help="another learning rate")
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    parser.add_argument("--model", type=existing_folder, default=tune.MODEL)
    args = parser.parse_args()
    api.hush()
    torch.set_num_threads(1)
    kept = results.Kept(args.results, args.model)
    found = {}
    for site, seed, way in itertools.product(args.sites, args.seeds, args.ways):
        settings = {"site": site, "way": way, "seed": seed, "rounds": args.rounds}
        settings |= {} if args.rate is None else {"rate": args.rate}
        found[site, seed, way] = kept(functools.partial(measure, args.data, args.model, **settings), **settings)
    print(table(found))


if __name__ == "__main__":
    main()
