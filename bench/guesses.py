"""What a question in MedQuAD asks for, by its answer: one source of answers has labels, the others guess them.

    .venv/bin/python bench/guesses.py --data ../shared/data --features features --write

The label is the type of a question (such as symptoms), the text the first 48 tokens of its answer, and every owner has the
answers of one web site. One site's are labeled, those of the others are not. Layer and ridge are those that are best on a fifth
of the labeled records, made of the others. Hidden states are computed once, by the product's functions, and stored; sums, heads
and guesses are the product's, too. Accuracy on the owners' own records, mean over owners:

- "labels alone": the head of the labeled site;
- "with guesses": after four exchanges; "kept": what each owner keeps, by how often the heads of two halves agree;
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
from torch import Tensor
from transformers.utils import logging

from fedgrove.files import read_lines
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.stages.head.halves import HALVES, added, guess, half_of
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


def said(head: Head, features: Tensor) -> Tensor:
    """The labels that a head finds."""
    linear, classes = head
    return classes[(features @ linear.weight.T + linear.bias).argmax(1)]


def accuracy(head: Head, records: Records) -> float:
    """In percent."""
    return 100 * float((said(head, records[0]) == records[1]).double().mean())


def guessed(problem: Problem, shuffle: bool) -> tuple[Head, Head, dict[str, tuple[float, float]]]:
    """The head before guesses and after them; by owner, how often the heads of two halves agree, before and after."""
    features, truth = problem.labeled
    halves = half_of(len(truth))
    labeled = known = [problem.sums(features[halves == half], truth[halves == half]) for half in range(HALVES)]
    generator = torch.Generator().manual_seed(0)
    agreed: list[dict[str, float]] = []
    for exchange in range(EXCHANGES + 1):
        both = [problem.solve(part) for part in known]
        if exchange in (0, EXCHANGES):
            agreed.append({
                name: float((said(both[0], of) == said(both[1], of)).double().mean())
                for name, (of, _) in problem.owners.items()
            })  # fmt: skip
        if exchange == EXCHANGES:
            break
        guesses = []
        for half in range(HALVES):
            parts = []
            for own, _ in problem.owners.values():
                mine = own[half_of(len(own)) == half]
                found, chosen = guess(*both[HALVES - 1 - half], mine)
                labels = found[chosen]
                parts.append(
                    problem.sums(mine[chosen], labels[torch.randperm(len(labels), generator=generator)] if shuffle else labels)
                )
            guesses.append(added(parts))
        known = [one.plus(more) for one, more in zip(labeled, guesses, strict=True)]
    between = {name: (agreed[0][name], agreed[1][name]) for name in problem.owners}
    return problem.solve(added(labeled)), problem.solve(added(known)), between


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
    _, layer, ridge = best[0], -best[1], best[2]
    owners = {}
    for source in sorted({one["source"] for one in records} - {site}):
        which = rows(source)
        if len(which) >= FEWEST:
            owners[source] = taken(which, layer)
    owners = {name: of for name, of in owners.items() if len(set(of[1].tolist())) > 1}
    return Problem(labels, taken(rows(site), layer), owners, head, ridge), layer


def measured(problem: Problem) -> list[str]:
    """The cells of a row, from "labels alone" on."""
    before, after, agreed = guessed(problem, shuffle=False)
    _, shuffled, _ = guessed(problem, shuffle=True)
    every = problem.solve(added([problem.sums(*problem.labeled), *(problem.sums(*of) for of in problem.owners.values())]))
    by = {
        name: [
            accuracy(head, of)
            for head in (before, after, after if agreed[name][1] > agreed[name][0] else before, shuffled, every)
        ]
        for name, of in problem.owners.items()
    }
    means = [statistics.mean(column) for column in zip(*by.values(), strict=True)]
    worst = min(by, key=lambda name: by[name][2] - by[name][0])
    change = f"{by[worst][2] - by[worst][0]:+.1f} ({worst}, {len(problem.owners[worst][1])} records)"
    return [*(f"{mean:.1f}" for mean in means[:3]), change, *(f"{mean:.1f}" for mean in means[3:])]


def same_site(problem: Problem) -> str:
    """Accuracy on records of the labeled site that lost their labels, before guesses and after."""
    features, truth = problem.labeled
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    kept, lost = order[::2], order[1::2]
    one = Problem(
        problem.labels, (features[kept], truth[kept]), {"": (features[lost], truth[lost])}, problem.head, problem.ridge
    )
    before, after, _ = guessed(one, shuffle=False)
    return f"{accuracy(before, one.owners['']):.1f}, {accuracy(after, one.owners['']):.1f}"


def main() -> None:
    """Computes hidden states once and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with medquad")
    parser.add_argument("--features", type=Path, required=True, help="a folder for hidden states, which are computed once")
    parser.add_argument("--model", type=Path, default=tune.MODEL)
    parser.add_argument("--head", choices=heads.HEADS, default="ridge")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md, too")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.features.mkdir(parents=True, exist_ok=True)
    stored = args.features / f"medquad-{args.model.name}.safetensors"
    lines = [one for part in ("train", "test") for one in read_lines(args.data / "medquad" / f"{part}.jsonl")]
    every = [{"text": one["answer"], "label": one["type"], "source": one["source"]} for one in lines]
    file = args.features / "medquad.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in every), encoding="utf-8")
    posts = heads.Posts(args.model, file, sorted({one["label"] for one in every}), stored, None)
    records = read_lines(stored.with_suffix(".jsonl"))
    rows = [
        "| labeled | labels | owners | labels alone | with guesses | kept | its worst change | shuffled | labeled owners "
        "| same site: before, after |",
        "|---|---|---|---|---|---|---|---|---|---|",
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
