"""Solvers side by side on one and the same set of sums: perplexity, and the solver's seconds.

    .venv/bin/python bench/sums.py --data ../shared/data --model smollm2 --sums sums.safetensors \
        --solve sparsegpt/0.5/mean sparsegpt/0.5/each alps/0.5/each sparsegpt/0.6/each alps/0.6/each

Σ x xᵀ of the dense model over four owners of bench/owners.py is computed once and kept in the file ``--sums``. After that a
pruner, a target and a kind of damping take a minute, most of it for perplexity on held-out text of the same owners.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import owners
import torch
from arguments import existing_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgrove.data.sources import DEFAULT_TEMPLATE
from fedgrove.data.windows import calibration_windows, evaluation_windows
from fedgrove.input_statistics import statistics as input_statistics
from fedgrove.input_statistics.probe import probe
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.masks import Target
from fedgrove.models.perplexity import perplexity
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.prune import pruners
from fedgrove.stages.prune.calibration_pass import gather

OWNERS = ("medquad", "pubmedqa", "rust", "shakespeare")
LENGTH = 512

Sums = dict[str, Tensor]  # block/linear: Σ x xᵀ of its input


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=existing_folder, required=True, help="the folder with the owners' texts")
    arguments.add_argument("--model", type=existing_folder, default=owners.GROVE)
    arguments.add_argument("--sums", type=Path, required=True, help="a safetensors file; made if it does not exist")
    arguments.add_argument("--solve", nargs="+", required=True, help="PRUNER/TARGET/DAMPING each")
    arguments.add_argument("--own", type=float, default=input_statistics.OWN)
    arguments.add_argument("--floor", type=float, default=input_statistics.FLOOR)
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--windows", type=int, default=8)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    input_statistics.OWN, input_statistics.FLOOR = given.own, given.floor
    decoder = Decoder(Checkpoint(given.model))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = dict(owners.plain_files(given.data, folder))
        if not given.sums.is_file():
            save_file(summed(decoder, files, given), given.sums)
        sums = load_file(given.sums)
        print("| | " + " | ".join(OWNERS) + " | mean | solver, s |\n|---|" + "---|" * (len(OWNERS) + 2), flush=True)
        for number, wanted in enumerate(given.solve):
            seconds = solve(decoder, sums, wanted, folder / f"{number}")
            model = Decoder(decoder.checkpoint.over(folder / f"{number}"))
            values = [perplexity(model, held_out(decoder, files[f"{owner}-heldout"], given)) for owner in OWNERS]
            cells = " | ".join(f"{value:.2f}" for value in (*values, statistics.geometric_mean(values)))
            print(f"| {wanted} | {cells} | {seconds:.1f} |", flush=True)


def summed(decoder: Decoder, files: dict[str, Path], given: argparse.Namespace) -> Sums:
    """Σ x xᵀ of every input of the dense model, over the windows of all owners; an input is named after its first linear."""
    tokenizer = decoder.checkpoint.tokenizer()
    drawn = [
        calibration_windows([files[owner]], DEFAULT_TEMPLATE, tokenizer, given.samples, LENGTH, f"0/0/{owner}")
        for owner in OWNERS
    ]
    hidden = [decoder.embed(window[None])[0] for window in torch.cat(drawn)]
    calls = decoder.calls(1, LENGTH)
    sums: Sums = {}
    with torch.no_grad():
        for index in range(len(decoder)):
            outputs: list[Tensor] = []
            with decoder.loaded(index) as block:
                found = gather(decoder, block, hidden, calls[index], "gram", outputs.extend)
            first = {id(inputs): linear for linear, inputs in reversed(found.items())}
            sums |= {f"{index}/{linear}": found[linear].gram.float() for linear in first.values()}
            hidden = outputs
    return sums


def solve(decoder: Decoder, sums: Sums, wanted: str, overlay: Path) -> float:
    """Prunes every block into a folder; the seconds of the pruner alone."""
    pruner, goal, damping = wanted.split("/")
    ratio: Any = tuple(map(int, goal.split(":"))) if ":" in goal else None
    target = Target.of(None, ratio) if ratio else Target(float(goal))
    overlay.mkdir()
    seconds = 0.0
    for index, shared in enumerate(probe(decoder, LENGTH, seed=0)):
        weights = {}
        for first, one in shared.items():
            inputs = InputStatistics("gram", total=sums[f"{index}/{first}"].double())
            for linear in one.consumers:
                weight = decoder.read_linear(index, linear)
                began = time.perf_counter()
                pruned, _ = pruners.prune(pruner, weight.float().contiguous(), inputs, target, damping)  # type: ignore[arg-type]
                seconds += time.perf_counter() - began
                module = decoder.blocks[index].get_submodule(linear)
                weights[decoder.block_names(index)[linear]] = as_matrix(module, pruned.to(weight.dtype)).contiguous()
        save_file(weights, overlay / f"block-{index:04d}.safetensors")
    return seconds


def held_out(decoder: Decoder, file: Path, given: argparse.Namespace) -> list[Tensor]:
    return evaluation_windows(file, DEFAULT_TEMPLATE, decoder.checkpoint.tokenizer(), LENGTH, given.windows)


if __name__ == "__main__":
    main()
