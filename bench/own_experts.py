"""Half of a mixture's experts for each owner: by what they add to its text, by how often it uses them, and at random.

    .venv/bin/python bench/own_experts.py --data ../shared/data --write
    .venv/bin/python bench/own_experts.py --data ../shared/data --newsgroups --write

The mixture is that of bench/experts.py. Its three owners, or with ``--newsgroups`` owners of the posts of one newsgroup each,
tune it together in a job in which each writes a model of half of the experts (``personal_experts = 0.5``). Then each owner's
held-out text is measured on the whole model, on the model that it wrote, and on other halves of the same model. The losses of
all windows are kept in bench/own_experts.jsonl and not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import owners
import page
import torch
from arguments import existing_folder
from experts import GROVE, LENGTH, OWNERS, save, train, upcycled
from results import Kept
from torch import Tensor

from fedgrove import api
from fedgrove.client.windows import training_windows
from fedgrove.data.windows import evaluation_windows
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import KeptExperts, routing_of
from fedgrove.models.expert_sums import OUTPUTS, TOKENS, blocks_with_experts
from fedgrove.models.held import HeldDecoder
from fedgrove.models.perplexity import negative_log_likelihoods
from fedgrove.models.stream import Checkpoint
from fedgrove.report.paired import Examples, ratio_interval
from fedgrove.run import local_clients, open_model
from fedgrove.stages.tune.exchanges.experts import chosen, own_sums

RESULTS = Path(__file__).with_suffix(".jsonl")
GROUPS = ("sci.space", "rec.sport.hockey", "soc.religion.christian")
DRAWS = 3  # of experts at random
RANDOM = f"half at random, mean of {DRAWS}"

Losses = list[float]  # of each held-out window, the mean over its tokens


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=existing_folder, required=True, help="the folder with the owners' texts")
    arguments.add_argument("--steps", type=int, default=60, help="of training the mixture, 4 × 256 tokens each")
    arguments.add_argument("--rounds", type=int, default=4, help="of tuning, 4 steps of 2 windows each")
    arguments.add_argument("--noise", type=float, default=0.1, help="of the copies, as a fraction of the weights' deviation")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--newsgroups", action="store_true", help="owners with posts of one newsgroup each")
    arguments.add_argument("--windows", type=int, default=8, help="held-out windows of 256 tokens of each owner")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--kept", action="store_true", help="measure nothing: the table of what the results hold")
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    api.hush()
    with tempfile.TemporaryDirectory() as folder:
        text = table(given, Path(folder))
    print(text)
    if given.write:
        page.write("own-experts-newsgroups" if given.newsgroups else "own-experts", text)


def table(given: Any, folder: Path) -> str:
    """Each owner's loss on its own held-out text, by seed."""
    files = dict(group_files(given.data, folder) if given.newsgroups else owners.plain_files(given.data, folder))
    kept = Kept(RESULTS, GROVE, only=given.kept)
    settings = {key: getattr(given, key) for key in ("steps", "rounds", "noise", "windows")}
    if given.newsgroups:
        settings["owners"] = GROUPS
    found: dict[str, dict[str, list[Losses]]] = {}
    for seed in given.seeds:
        measured: dict[str, dict[str, Losses]] = kept(partial(measure, given, files, folder, seed), seed=seed, **settings) or {}
        for owner, rows in measured.items():
            for row, losses in rows.items():
                found.setdefault(owner, {}).setdefault(row, []).append(losses)
    lines = [
        "| owner | experts | loss on its own text, by seed | mean | over the whole model | less than at random (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for owner, by_row in found.items():
        whole = mean_of(by_row["all"])
        for row, every in by_row.items():
            mean = mean_of(every)
            by_seed = ", ".join(f"{statistics.mean(one):.3f}" for one in every)
            less = "–" if row in ("all", RANDOM) else saved(every, by_row[RANDOM])
            lines.append(f"| {owner} | {row} | {by_seed} | {mean:.3f} | {mean / whole - 1:+.1%} | {less} |")
    return "\n".join(lines)


def mean_of(every: list[Losses]) -> float:
    """The mean over seeds and windows."""
    return statistics.mean(map(statistics.mean, every))


def saved(every: list[Losses], random: list[Losses]) -> str:
    """How much lower the loss is than with experts at random, with the interval over windows: the paired bootstrap."""
    between = ratio_interval(examples(random), examples(every), [""])
    interval = f" ({math.log(between[0]):.3f} to {math.log(between[1]):.3f})" if between else ""
    return f"{mean_of(random) - mean_of(every):.3f}{interval}"


def examples(every: list[Losses]) -> list[Examples]:
    """(loss, tokens) of each window, of each seed's model."""
    return [{"": [(loss * LENGTH, LENGTH) for loss in losses]} for losses in every]


def group_files(data: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The posts of each newsgroup, to train on and held out."""
    for part, ending in (("train", ""), ("test", "-heldout")):
        posts = [json.loads(line) for line in (data / "newsgroups" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        for group in GROUPS:
            name = f"{group}{ending}"
            texts = [json.dumps({"text": post["text"]}) for post in posts if post["label"] == group]
            (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
            yield name, folder / f"{name}.jsonl"


def measure(given: Any, files: dict[str, Path], folder: Path, seed: int) -> dict[str, dict[str, Losses]]:
    """By owner, the losses of the tuned model, and of halves of it."""
    names = GROUPS if given.newsgroups else OWNERS
    model = folder / f"mixture-{seed}"
    mixture = upcycled(given.noise, seed)
    train(mixture, [files[owner] for owner in names], given.steps, seed)
    save(mixture, model)
    stage = {
        "kind": "tune", "method": "lora", "rounds": given.rounds, "steps": 4, "batches": [2], "ranks": [4], "bits": [32],
        "length": LENGTH, "personal_experts": 0.5,
    }  # fmt: skip
    clients = [{"name": owner, "data": str(files[owner])} for owner in names]
    job = Job.model_validate(
        {"name": "own", "seed": seed, "model": {"path": str(model)}, "clients": clients, "stages": [stage]}
    )
    run = folder / f"run-{seed}"
    api.run(job, run, quiet=True)
    tuned = Checkpoint(run / "model")
    tokenizer, blocks, routing = tuned.tokenizer(), blocks_with_experts(Decoder(tuned)), routing_of(tuned.config)
    half = routing.experts // 2
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> KeptExperts:
        return {block: tuple(sorted(torch.randperm(routing.experts, generator=generator)[:half].tolist())) for block in blocks}

    halves: dict[str, dict[str, KeptExperts]] = {}
    for client in local_clients(job, open_model(job.model), folder / f"again-{seed}"):
        sums = own_sums(Decoder(tuned), training_windows(client, LENGTH)[0], client, 0, f"{seed}/0/own")
        halves[client.name] = {value: chosen(sums, blocks, value, half, 1) for value in (OUTPUTS, TOKENS)}
    result: dict[str, dict[str, Losses]] = {}
    for place, owner in enumerate(names):
        windows = evaluation_windows(files[f"{owner}-heldout"], None, tokenizer, LENGTH, given.windows)

        def losses(decoder: Decoder, windows: list[Tensor] = windows) -> Losses:
            return [round(nll / count, 5) for nll, count in negative_log_likelihoods(decoder, windows)]

        other = halves[names[(place + 1) % len(names)]][OUTPUTS]
        drawings = [losses(HeldDecoder(tuned, drawn())) for _ in range(DRAWS)]
        result[owner] = {
            "all": losses(Decoder(tuned)),
            "its own half": losses(Decoder(Checkpoint(run / "clients" / owner / "personal" / "experts-0"))),
            "its own half, by tokens": losses(HeldDecoder(tuned, halves[owner][TOKENS])),
            "another owner's half": losses(HeldDecoder(tuned, other)),
            RANDOM: [statistics.mean(at) for at in zip(*drawings, strict=True)],
        }
    return result


if __name__ == "__main__":
    main()
