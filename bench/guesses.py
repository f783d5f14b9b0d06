"""What a question in MedQuAD asks for, by its answer: one source of answers has labels, the others guess them.

    .venv/bin/python bench/guesses.py --data ../shared/data --features features --write

The label is the type of a question (such as symptoms), the text the first 48 tokens of its answer, and every owner has the
answers of one web site. One site's are labeled, those of the others are not. Layer and ridge are those that are best on a fifth
of the labeled records, made of the others. Hidden states are computed once, by the product's functions, and stored; sums, heads
and guesses are the product's, too. Accuracy on the owners' own records, mean over owners:

- "labels alone": the head of the labeled site; "with guesses": after four exchanges;
- "shuffled": the same, but every owner's chosen guesses change places: a control;
- "labeled owners": the head of everybody's labels.

"Same site" is another control: half of the labeled site's records lose their labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import heads
import page
import torch
import tune
from arguments import existing_folder
from torch import Tensor
from transformers.utils import logging

from fedgrove.files import read_lines
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.stages.head.exchanges.guesses import guess
from fedgrove.stages.head.heads import Linear, head_of
from fedgrove.stages.head.solving import solve

SITES = ("GARD", "GHR", "NIDDK", "NINDS")  # that are labeled in turn
EXCHANGES, FEWEST_OF_LABEL, FEWEST = 4, 15, 30
Head = tuple[Linear, Tensor]
Records = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """Features and labels of one labeled owner and of others.

    Attributes:
        labels: those of which the labeled owner has enough records.
        labeled: the labeled owner's records.
        owners: the others' records of these labels, by name.
        head, ridge: as in a job.
    """

    labels: list[str]
    labeled: Records
    owners: dict[str, Records]
    head: str
    ridge: float

    def sums(self, features: Tensor, classes: Tensor) -> Moments:
        return Moments.over(features, classes, len(self.labels), head_of(self.head).PRODUCTS)

    def solve(self, moments: Moments) -> Head:
        return solve(moments, self.head, self.ridge, self.labels)


def answers(data: Path) -> list[dict[str, str]]:
    """Every answer of MedQuAD, the type of its question as its label, and the web site that it is from."""
    every = [one for part in ("train", "test") for one in read_lines(data / "medquad" / f"{part}.jsonl")]
    return [{"text": one["answer"], "label": one["type"], "source": one["source"]} for one in every]


def accuracy(head: Head, records: Records) -> float:
    """In percent."""
    return 100 * heads.right(*head, *records)


def guessed(problem: Problem, shuffle: bool) -> Head:
    """The head after guesses."""
    labeled = known = problem.sums(*problem.labeled)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EXCHANGES):
        head, known = problem.solve(known), labeled
        for features, _ in problem.owners.values():
            found, chosen = guess(*head, features)
            labels = found[chosen]
            if shuffle:
                labels = labels[torch.randperm(len(labels), generator=generator)]
            known = known.plus(problem.sums(features[chosen], labels))
    return problem.solve(known)


def problem_of(posts: heads.Posts, records: list[dict[str, str]], site: str, head: str) -> tuple[Problem, int]:
    """The problem in which one site is labeled, and the layer that is best on a fifth of its records."""
    types = Counter(one["label"] for one in records if one["source"] == site)
    labels = sorted(label for label, number in types.items() if number >= FEWEST_OF_LABEL)

    def rows(source: str) -> Tensor:
        return torch.tensor([i for i, one in enumerate(records) if one["source"] == source and one["label"] in labels])

    def taken(which: Tensor, layer: int) -> Records:
        return posts.features((layer,), None)[which], torch.tensor([labels.index(records[i]["label"]) for i in which.tolist()])

    best = (-1.0, 0, 0.1)
    for layer in range(posts.states.shape[1]):
        features, truth = taken(rows(site), layer)
        test = torch.arange(len(truth)) % 5 == 0
        for ridge in heads.RIDGES:
            trial = Problem(labels, (features, truth), {}, head, ridge)
            found = accuracy(trial.solve(trial.sums(features[~test], truth[~test])), (features[test], truth[test]))
            best = max(best, (found, -layer, ridge))
    layer, ridge = -best[1], best[2]
    others = {source: rows(source) for source in sorted({one["source"] for one in records} - {site})}
    owners = {source: taken(which, layer) for source, which in others.items() if len(which) >= FEWEST}
    owners = {source: of for source, of in owners.items() if len(set(of[1].tolist())) > 1}
    return Problem(labels, taken(rows(site), layer), owners, head, ridge), layer


def measured(problem: Problem) -> list[str]:
    """The cells of a row, from "labels alone" on."""
    labeled = every = problem.sums(*problem.labeled)
    for of in problem.owners.values():
        every = every.plus(problem.sums(*of))
    made = [
        problem.solve(labeled), guessed(problem, shuffle=False), guessed(problem, shuffle=True),
        problem.solve(every),
    ]  # fmt: skip
    by = {name: [accuracy(head, of) for head in made] for name, of in problem.owners.items()}
    means = [f"{statistics.mean(column):.1f}" for column in zip(*by.values(), strict=True)]
    changes = {name: of[1] - of[0] for name, of in by.items()}
    worst = min(changes, key=changes.__getitem__)
    return [*means[:2], f"{changes[worst]:+.1f} ({worst}, {len(problem.owners[worst][1])} records)", *means[2:]]


def same_site(problem: Problem) -> str:
    """Accuracy on records of the labeled site that lost their labels, before guesses and after."""
    features, truth = problem.labeled
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    kept, lost = order[::2], order[1::2]
    owners = {"": (features[lost], truth[lost])}
    one = Problem(problem.labels, (features[kept], truth[kept]), owners, problem.head, problem.ridge)
    before, after = one.solve(one.sums(*one.labeled)), guessed(one, shuffle=False)
    return f"{accuracy(before, owners['']):.1f}, {accuracy(after, owners['']):.1f}"


def main() -> None:
    """Computes hidden states once and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with medquad")
    parser.add_argument("--features", type=Path, required=True, help="a folder for hidden states, which are computed once")
    parser.add_argument("--model", type=existing_folder, default=tune.MODEL)
    parser.add_argument("--head", choices=heads.HEADS, default="ridge")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md, too")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.features.mkdir(parents=True, exist_ok=True)
    stored = args.features / f"medquad-{args.model.name}.safetensors"
    every = answers(args.data)
    file = args.features / "medquad.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in every), encoding="utf-8")
    posts = heads.Posts(args.model, file, sorted({one["label"] for one in every}), stored, None)
    records = read_lines(stored.with_suffix(".jsonl"))
    rows = [
        "| labeled | labels | owners | labels alone | with guesses | the worst change | shuffled | labeled owners "
        "| same site: before, after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for site in SITES:
        problem, layer = problem_of(posts, records, site, args.head)
        first = [f"{site} ({len(problem.labeled[1])}; layer {layer})", str(len(problem.labels)), str(len(problem.owners))]
        rows.append(f"| {' | '.join([*first, *measured(problem), same_site(problem)])} |")
    text = "\n".join(rows)
    print(text)
    if args.write:
        page.write(f"guesses-{args.model.name}", text)


if __name__ == "__main__":
    main()
