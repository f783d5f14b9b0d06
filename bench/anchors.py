"""One head for owners with different models: features that say how like a post is to public texts, which every model can tell.

    .venv/bin/python bench/anchors.py --data ../shared/data --larger SMOLLM2 --features features

Which of 20 newsgroups a post is from. Posts are dealt to eight owners by label; four have the smaller model and four the larger
one. States of different models cannot be added up. A post's products with the states of 512 paragraphs of WikiText-2 can
(relative representations, Moschella et al., ICLR 2023): "cosine" is as published, "whitened" takes the products after the
anchors' covariance is made 1. The layer, the kind of product and the ridge are chosen on a tenth of the posts, which is then
left out. Measured are test posts by the smaller model: with the head from the four owners who have it, from its own states
("native") and from products, with the head from the products of all eight, and what all eight would have with one model.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from pathlib import Path

import numpy as np
import torch
import tune
from arguments import existing_folder
from heads import OWNERS, RIDGES, Posts, right
from torch import Tensor
from transformers.utils import logging

from fedgrove.files import read_lines
from fedgrove.models.blocks import Decoder
from fedgrove.models.features import pooled_states
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.split import by_dirichlet
from fedgrove.stages.head.heads import head_of
from fedgrove.stages.head.solving import solve

ANCHORS, LENGTH = 512, 48
KINDS = ("cosine", "whitened")
HEAD = "ridge"


def anchors_of(model: Path, texts: list[str]) -> Tensor:
    """The mean state of each anchor in every layer, (anchors, layers, width) float32."""
    decoder = Decoder(Checkpoint(model))
    tokenizer = decoder.checkpoint.tokenizer()
    windows = [torch.tensor(tokenizer(text)["input_ids"][:LENGTH]) for text in texts]
    with torch.no_grad():
        states = pooled_states(decoder, windows, range(len(decoder) + 1), "mean")
    return states.view(len(windows), len(decoder) + 1, -1)


def products(states: Tensor, anchors: Tensor, kind: str) -> Tensor:
    """How like each post is to each anchor, (posts, anchors) float64, rows of length √anchors.

    Args:
        states: (posts, width).
        anchors: (anchors, width).
        kind: "cosine" or "whitened".
    """
    center = anchors.double().mean(0)
    posts, known = states.double() - center, anchors.double() - center
    if kind == "whitened":
        covariance = known.T @ known / len(known)
        covariance += 0.1 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        found = posts @ torch.linalg.solve(covariance, known.T)
    else:
        found = posts @ (known / known.norm(dim=1, keepdim=True)).T
    return found / found.norm(dim=1, keepdim=True) * len(known) ** 0.5


class Model:
    """A model's features of the same posts.

    Attributes:
        layer, kind, ridge: of products, chosen on a tenth of the training posts.
        train, test: products.
        native: states of the layer that is best for them, of training and of test posts; its ridge.
    """

    def __init__(self, train: Posts, test: Posts, anchors: Tensor, labels: list[str]):
        cut, number = len(train.truth) // 10, len(labels)

        def best(of: Tensor) -> tuple[float, float]:
            total = Moments.over(of[cut:], train.truth[cut:], number, head_of(HEAD).PRODUCTS)
            return max((right(*solve(total, HEAD, ridge, labels), of[:cut], train.truth[:cut]), ridge) for ridge in RIDGES)

        layers = range(train.states.shape[1])
        tried = [
            (*best(products(train.states[:, layer], anchors[:, layer], kind)), layer, kind)
            for layer, kind in itertools.product(layers, KINDS)
        ]
        self.accuracy, self.ridge, self.layer, self.kind = max(tried)
        self.train, self.test = (
            products(part.states[:, self.layer], anchors[:, self.layer], self.kind) for part in (train, test)
        )
        _, ridge, layer = max((*best(train.features((layer,), None)), layer) for layer in layers)
        self.native = train.features((layer,), None), test.features((layer,), None), ridge


def main() -> None:
    """Computes states once, chooses layers, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with newsgroups and text")
    parser.add_argument("--features", type=Path, required=True, help="a folder for hidden states, which are computed once")
    parser.add_argument("--model", type=existing_folder, default=tune.MODEL, help="the smaller one")
    parser.add_argument("--larger", type=existing_folder, required=True)
    parser.add_argument("--train", type=int, default=2000, help="so many training posts, drawn")
    parser.add_argument("--test", type=int, default=500, help="so many test posts, drawn")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.features.mkdir(parents=True, exist_ok=True)
    folder = args.data / "newsgroups"
    labels = sorted({line["label"] for line in read_lines(folder / "train.jsonl")})
    lines = (args.data / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if len(line) > 300][:ANCHORS]
    models, truth = [], {}
    for path in (args.model, args.larger):
        parts = {}
        for part, most in (("train", args.train), ("test", args.test)):
            stored = args.features / f"{path.name}-{part}-{most}.safetensors"
            parts[part] = Posts(path, folder / f"{part}.jsonl", labels, stored, most)
            if not torch.equal(truth.setdefault(part, parts[part].truth), parts[part].truth):
                raise SystemExit("the models' tokenizers leave other posts: choose other models")
        model = Model(parts["train"], parts["test"], anchors_of(path, texts), labels)
        chosen = f"layer {model.layer}, {model.kind}, ridge {model.ridge:g}"
        print(f"{path.name}: {chosen}; on validation posts {model.accuracy:.1%}")
        models.append(model)
    small, large = models
    cut = len(truth["train"]) // 10
    known, tests = truth["train"][cut:], truth["test"]
    print(f"{len(known)} posts to deal, {len(tests)} to test, {len(texts)} anchors")
    print("| Dirichlet | four owners, native | four owners, products | all eight, products | all eight, one model, native |")
    print("|---|---|---|---|---|")
    adds = head_of(HEAD).PRODUCTS
    for alpha in (0.1, 0.3):
        runs = []
        for seed in args.seeds:
            rng = np.random.default_rng(seed)
            dealt = by_dirichlet(range(len(known)), [labels[i] for i in known], OWNERS, alpha, rng)
            parts_ = [torch.tensor(sorted(part)) for part in dealt]

            def sums(features: Tensor, owners: list[Tensor]) -> Moments:
                each = [Moments.over(features[one], known[one], len(labels), adds) for one in owners if len(one)]
                return functools.reduce(Moments.plus, each)

            mine, others = parts_[0::2], parts_[1::2]
            native, native_test, ridge = small.native
            of_mine = sums(small.train[cut:], mine)
            heads = [
                (sums(native[cut:], mine), native_test, ridge),
                (of_mine, small.test, small.ridge),
                (of_mine.plus(sums(large.train[cut:], others)), small.test, small.ridge),
                (sums(native[cut:], parts_), native_test, ridge),
            ]
            runs.append([right(*solve(total, HEAD, ridge, labels), test, tests) for total, test, ridge in heads])
        columns = zip(*runs, strict=True)
        cells = [f"{statistics.mean(one):.1%} ({', '.join(f'{seed:.1%}' for seed in one)})" for one in columns]
        print(f"| {alpha} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
