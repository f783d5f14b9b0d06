"""What a step along random directions is worth, by which linears move: from gradients and curvature at the start.

    .venv/bin/python bench/which_linears.py --data ../shared/data --model SMOLLM2 --tasks e2e medquad

A step by the slope of n windows along signs z lowers the loss by η·G − η²·(G + N/n)·T/2 in the mean: G is the squared length of
the gradient, N the variance of a window's gradient, and T the trace of the curvature, each over the entries that move. So the
best step gains G²/(2·T·(G + N/n)). G and N are those of answers (as in bench/seeds.py --long), without bias; T is the mean of
zᵀHz over random signs, by differences of gradients. "gain": of the best step, relative to moving all linears. "blocks": the
same for all linears of a sixth of the blocks.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

import torch
import tune
from arguments import existing_folder
from seeds import TEMPLATES
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fedgrove.files import read_lines
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint

LENGTH, FEWEST = 128, 8  # tokens of a window, and those of its answer
PROBES, EACH, EPSILON = 6, 4, 2.0**-10  # for the trace: directions, windows of each, distance


class Start:
    """A model with its blocks' linears, and answers.

    Attributes:
        linears: their names.
    """

    def __init__(self, model: Path, data: Path, task: str, windows: int):
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
        weights = Decoder(Checkpoint(model)).linear_names()
        self.linears = list(weights)
        self._weights = [self._model.get_parameter(name).requires_grad_() for name in weights.values()]
        tokenizer, (prompt, answer) = AutoTokenizer.from_pretrained(model), TEMPLATES[task]
        records = read_lines(data / task / "train.jsonl")
        random.Random(1).shuffle(records)
        self._windows: list[tuple[Tensor, Tensor]] = []
        for record in records:
            begin, end = (tokenizer(part.format(**record), add_special_tokens=False)["input_ids"] for part in (prompt, answer))
            ids, labels = [*begin, *end][:LENGTH], [*[-100] * len(begin), *end][:LENGTH]
            if sum(one >= 0 for one in labels) >= FEWEST:
                self._windows.append((torch.tensor([ids]), torch.tensor([labels])))
            if len(self._windows) == windows:
                break

    def gradient(self, window: int) -> tuple[Tensor, ...]:
        """Of the loss of one window, by linear."""
        ids, labels = self._windows[window]
        return torch.autograd.grad(self._model(input_ids=ids, labels=labels).loss, self._weights)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """G and N of every linear, (linears,) float64 each."""
        total = [torch.zeros_like(weight, dtype=torch.float64) for weight in self._weights]
        squares = torch.zeros(len(total), dtype=torch.float64)
        for window in range(len(self._windows)):
            for place, one in enumerate(self.gradient(window)):
                squares[place] += one.double().square().sum()
                total[place] += one
        count = len(self._windows)
        g = (torch.stack([one.square().sum() for one in total]) - squares) / (count * (count - 1))
        return g, squares / count - g

    def traces(self) -> Tensor:
        """T of every linear, (linears,) float64."""
        found = torch.zeros(len(self._weights), dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for probe in range(PROBES):
            signs = [torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1 for weight in self._weights]
            for window in range(probe * EACH, (probe + 1) * EACH):
                self._move(signs, EPSILON)
                above = self.gradient(window)
                self._move(signs, -2 * EPSILON)
                below = self.gradient(window)
                self._move(signs, EPSILON)
                for place, (one, other, z) in enumerate(zip(above, below, signs, strict=True)):
                    found[place] += ((one - other) * z).double().sum() / (2 * EPSILON)
        return found / (PROBES * EACH)

    @torch.no_grad()
    def _move(self, signs: list[Tensor], distance: float) -> None:
        for weight, z in zip(self._weights, signs, strict=True):
            weight.add_(z, alpha=distance)


def groups(linears: list[str]) -> dict[str, list[int]]:
    """The places of the linears that move together: all, each kind, two kinds, and each sixth of the blocks."""
    ends = [name.rpartition(".")[2] for name in linears]
    blocks = [int(next(part for part in name.split(".") if part.isdigit())) for name in linears]
    number = max(blocks) + 1
    found = {"all": list(range(len(linears)))}
    for end in dict.fromkeys(ends):
        found[end] = [i for i, one in enumerate(ends) if one == end]
    for pair in (("v_proj", "down_proj"), ("q_proj", "v_proj")):
        if set(pair) <= set(ends):
            found[" and ".join(pair)] = [i for i, one in enumerate(ends) if one in pair]
    for sixth in range(6):
        part = range(number * sixth // 6, number * (sixth + 1) // 6)
        if part:
            found[f"blocks {part[0]} to {part[-1]}"] = [i for i, one in enumerate(blocks) if one in part]
    return found


def gain(g: float, n: float, t: float, windows: int) -> float:
    """What the best step by so many windows gains, in nats."""
    return g * g / (2 * t * (g + n / windows))


def rows(linears: list[str], sizes: tuple[Tensor, Tensor, Tensor]) -> Iterable[str]:
    """A line for each group."""
    every = [one.sum().item() for one in sizes]
    for name, places in groups(linears).items():
        g, n, t = (one[places].sum().item() for one in sizes)
        gains = (gain(g, n, t, windows) / gain(*every, windows) for windows in (4, 32))
        yield f"| {name} | {g:.3f} | {n:.2f} | {t:.0f} | {' | '.join(f'{one:.2f}' for one in gains)} |"


def main() -> None:
    """Prints a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with e2e and medquad")
    parser.add_argument("--model", type=existing_folder, default=tune.MODEL)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TEMPLATES), default=sorted(TEMPLATES))
    parser.add_argument("--windows", type=int, default=64)
    args = parser.parse_args()
    if args.windows < PROBES * EACH:
        parser.error(f"--windows: {PROBES * EACH} at least")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for task in args.tasks:
        start = Start(args.model, args.data, task, args.windows)
        sizes = (*start.lengths(), start.traces())
        print(f"\n{task}\n\n| what moves | G | N | T | gain, 4 windows | 32 windows |\n|---|---|---|---|---|---|")
        print("\n".join(rows(start.linears, sizes)), flush=True)


if __name__ == "__main__":
    main()
