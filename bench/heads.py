"""Which of 20 newsgroups a post is from: heads on the frozen model, from sums of eight owners and from one owner's posts alone.

    .venv/bin/python bench/heads.py --data ../shared/data --features features

Posts are dealt by label (Dirichlet 0.1 or 0.3); each owner holds out a fifth of its own. The layer and the ridge are chosen on
a tenth of the training posts, which is then left out. Layer 0, the embeddings, is a control: what words alone give. Hidden
states are computed once, by the product's functions, and stored; sums and heads are the product's, too. The global test are the
test posts. On the posts that owners held out, three heads are compared: that of all, the same for the owner's own frequencies
of labels, and that of the owner's posts alone.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tune
from arguments import existing_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from fedgrove.files import read_lines
from fedgrove.models.blocks import Decoder
from fedgrove.models.features import Features, pooled_states, projection, typical
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.split import by_dirichlet
from fedgrove.stages.head.heads import Linear, head_of
from fedgrove.stages.head.records import hold_out, read_labeled
from fedgrove.stages.head.solving import TooFew, solve

OWNERS, LENGTH, SHARE = 8, 48, 0.2
HEADS = ("prototypes", "discriminant", "ridge")
RIDGES = (0.03, 0.1, 0.3, 1.0)


class Posts:
    """Hidden states of all layers, and labels.

    Attributes:
        states: (posts, layers, width) float32.
        truth: (posts,) int64.
    """

    def __init__(self, model: Path, file: Path, labels: list[str], stored: Path, most: int | None):
        if not stored.is_file():
            decoder = Decoder(Checkpoint(model))
            layers = range(len(decoder) + 1)
            lines = file.read_text(encoding="utf-8").splitlines()
            random.Random("heads").shuffle(lines)
            part = stored.with_suffix(".jsonl")
            part.write_text("\n".join(lines[:most]) + "\n", encoding="utf-8")
            tokenizer = decoder.checkpoint.tokenizer()
            windows, truth = read_labeled([part], "{text}", "{label}", labels, tokenizer, LENGTH)
            with torch.no_grad():
                states = pooled_states(decoder, windows, layers, "mean").view(len(windows), len(layers), -1)
                center, scale = typical(decoder, layers, LENGTH, "0/0")
            save_file({"states": states, "truth": truth, "center": center, "scale": scale}, stored)
        found = load_file(stored)
        self.states, self.truth = found["states"], found["truth"]
        self._center, self._scale = (found[name].view(self.states.shape[1], -1) for name in ("center", "scale"))

    def features(self, layers: tuple[int, ...], size: int | None) -> Tensor:
        """(posts, features) float64, as the product makes them."""
        chosen = list(layers)
        center, scale = self._center[chosen].flatten(), self._scale[chosen].flatten()
        of = Features(layers, "mean", center, scale, projection(center.numel(), size, "0/0"))
        return of.of(self.states[:, chosen].flatten(1))


def scores(linear: Linear, classes: Tensor, features: Tensor, number: int) -> Tensor:
    """(posts, labels): −inf for labels that the head does not know."""
    found = torch.full((len(features), number), -torch.inf, dtype=torch.float64)
    found[:, classes] = features @ linear.weight.T + linear.bias
    return found


def right(linear: Linear, classes: Tensor, features: Tensor, truth: Tensor) -> float:
    """The accuracy."""
    return float((classes[(features @ linear.weight.T + linear.bias).argmax(1)] == truth).double().mean())


def compare(
    posts: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    labels: list[str],
    head: str,
    ridge: float,
    alpha: float,
    seed: int,
) -> dict[str, Any]:
    """All accuracies of one way to deal the posts."""
    features, truth = posts
    rng = np.random.default_rng(seed)
    dealt = [part for part in by_dirichlet(range(len(truth)), [labels[i] for i in truth], OWNERS, alpha, rng) if len(part) > 4]
    owners = []
    for part in dealt:
        index = torch.tensor(sorted(part))
        held_out = hold_out(truth[index], SHARE)
        owners.append((index[~held_out], index[held_out]))
    method, number = head_of(head), len(labels)
    moments = [Moments.over(features[kept], truth[kept], number, method.PRODUCTS) for kept, _ in owners]
    total = functools.reduce(Moments.plus, moments)
    shared, classes = solve(total, head, ridge, labels)
    frequencies = total.frequencies()[classes]
    found: dict[str, Any] = {"shared": right(shared, classes, *test), "alone": [], "owners": []}
    for (_, held_out), own in zip(owners, moments, strict=True):
        try:
            linear, known = solve(own, head, ridge, labels)
        except TooFew:
            known = own.counts.argmax()[None]
            linear = Linear(torch.zeros(1, features.shape[1]).double(), torch.zeros(1).double())
        found["alone"].append(right(linear, known, *test))
        counts = own.counts[classes].double()
        personal = method.reweigh(shared, frequencies, (counts + frequencies) / (counts.sum() + 1))
        mine = features[held_out], truth[held_out]
        found["owners"].append([right(shared, classes, *mine), right(personal, classes, *mine), right(linear, known, *mine)])
    return found


def choose(posts: Posts, labels: list[str], head: str, size: int | None) -> tuple[int, float, dict[int, float]]:
    """The layer and the ridge that are best on a tenth of the posts; the best accuracy of each layer."""
    cut = len(posts.truth) // 10
    by_layer: dict[int, float] = {}
    best = (-1.0, 0, 0.1)
    for layer in range(posts.states.shape[1]):
        features = posts.features((layer,), size)
        total = Moments.over(features[cut:], posts.truth[cut:], len(labels), head_of(head).PRODUCTS)
        for ridge in RIDGES:
            accuracy = right(*solve(total, head, ridge, labels), features[:cut], posts.truth[:cut])
            by_layer[layer] = max(by_layer.get(layer, 0.0), accuracy)
            best = max(best, (accuracy, -layer, ridge))
    return -best[1], best[2], by_layer


def main() -> None:
    """Computes hidden states once, chooses layers, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with newsgroups")
    parser.add_argument("--features", type=Path, required=True, help="a folder for hidden states, which are computed once")
    parser.add_argument("--model", type=existing_folder, default=tune.MODEL)
    parser.add_argument("--train", type=int, help="so many training posts, drawn; default: all")
    parser.add_argument("--test", type=int, help="so many test posts, drawn; default: all")
    parser.add_argument("--size", type=int, help="features after the projection; default: none")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.features.mkdir(parents=True, exist_ok=True)
    folder = args.data / "newsgroups"
    labels = sorted({line["label"] for line in read_lines(folder / "train.jsonl")})
    name = args.model.name
    train, test = (
        Posts(args.model, folder / f"{part}.jsonl", labels, args.features / f"{name}-{part}.safetensors", most)
        for part, most in (("train", args.train), ("test", args.test))
    )
    cut = len(train.truth) // 10
    print(
        f"{name}: {len(train.truth) - cut} posts to deal, {len(test.truth)} to test; a layer has {train.states.shape[2]} states"
    )
    rows = ["| head | layer | Dirichlet | global test, all | alone, mean | own posts: all | its own form | alone | seeds |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for head in HEADS:
        layer, ridge, by_layer = choose(train, labels, head, args.size)
        said = ", ".join(f"{at}: {accuracy:.1%}" for at, accuracy in by_layer.items())
        print(f"{head}: layer {layer}, ridge {ridge:g}; on validation posts by layer: {said}", flush=True)
        for (at, kind), alpha in itertools.product(((layer, ""), (0, " (embeddings)")), (0.1, 0.3)):
            if kind and layer == 0:
                continue
            posts, tests = train.features((at,), args.size)[cut:], test.features((at,), args.size)
            runs = [
                compare((posts, train.truth[cut:]), (tests, test.truth), labels, head, ridge, alpha, seed)
                for seed in args.seeds
            ]
            shared, alone = [one["shared"] for one in runs], [statistics.mean(one["alone"]) for one in runs]
            own = [[statistics.mean(owner[i] for owner in one["owners"]) for one in runs] for i in range(3)]
            worse = sum(owner[1] < max(owner[0], owner[2]) - 0.01 for one in runs for owner in one["owners"])
            number = sum(len(one["owners"]) for one in runs)
            cells = [f"{statistics.mean(values):.1%}" for values in (shared, alone, *own)]
            each = ", ".join(f"{a:.1%} / {b:.1%}" for a, b in zip(shared, alone, strict=True))
            rows.append(f"| {head} | {at}{kind} | {alpha} | {' | '.join(cells)} | {each}; {worse} of {number} owners worse |")
            print(
                json.dumps({"head": head, "layer": at, "alpha": alpha, "shared": shared, "alone": alone, "own": own}),
                flush=True,
            )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
