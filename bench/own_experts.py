"""Half of a mixture's experts for each owner: by what they add to its text, by how often it uses them, and at random.

    .venv/bin/python bench/own_experts.py --data ../shared/data --write
    .venv/bin/python bench/own_experts.py --data ../shared/data --newsgroups --write

The mixture is that of bench/experts.py. Its three owners, or with ``--newsgroups`` owners of the posts of one newsgroup each,
tune it together in a job in which each writes a model of half of the experts (``personal_experts = 0.5``). Then each owner's
held-out text is measured on the whole model, on the model that it wrote, and on other halves of the same model. Results are
kept in bench/own_experts.jsonl and not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import owners
import page
import torch
from experts import GROVE, LENGTH, OWNERS, save, train, upcycled
from results import Kept
from torch import Tensor
from transformers.utils import logging

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
from fedgrove.run import local_clients, open_model
from fedgrove.stages.tune.exchanges.experts import chosen, own_sums

RESULTS = Path(__file__).with_suffix(".jsonl")
GROUPS = ("sci.space", "rec.sport.hockey", "soc.religion.christian")
DRAWS = 3  # of experts at random


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="the folder with the owners' texts")
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
    logging.set_verbosity_error()
    logging.disable_progress_bar()
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
    found: dict[tuple[str, str], list[float]] = {}
    for seed in given.seeds:
        losses = kept(partial(measure, given, files, folder, seed), seed=seed, **settings)
        for owner, rows in (losses or {}).items():
            for row, loss in rows.items():
                found.setdefault((owner, row), []).append(loss)
    lines = ["| owner | experts | loss on its own text, by seed | mean | over the whole model |", "|---|---|---|---|---|"]
    for (owner, row), every in found.items():
        whole = statistics.mean(found[owner, "all"])
        mean = statistics.mean(every)
        lines.append(f"| {owner} | {row} | {', '.join(f'{one:.3f}' for one in every)} | {mean:.3f} | {mean / whole - 1:+.1%} |")
    return "\n".join(lines)


def group_files(data: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The posts of each newsgroup, to train on and held out."""
    for part, ending in (("train", ""), ("test", "-heldout")):
        posts = [json.loads(line) for line in (data / "newsgroups" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        for group in GROUPS:
            name = f"{group}{ending}"
            texts = [json.dumps({"text": post["text"]}) for post in posts if post["label"] == group]
            (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
            yield name, folder / f"{name}.jsonl"


def measure(given: Any, files: dict[str, Path], folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """By owner, the loss of the tuned model, and of halves of it."""
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
    result: dict[str, dict[str, float]] = {}
    for place, owner in enumerate(names):
        windows = evaluation_windows(files[f"{owner}-heldout"], None, tokenizer, LENGTH, given.windows)

        def loss(decoder: Decoder, windows: list[Tensor] = windows) -> float:
            parts = negative_log_likelihoods(decoder, windows)
            return sum(nll for nll, _ in parts) / sum(count for _, count in parts)

        other = halves[names[(place + 1) % len(names)]][OUTPUTS]
        result[owner] = {
            "all": loss(Decoder(tuned)),
            "its own half": loss(Decoder(Checkpoint(run / "clients" / owner / "personal" / "experts-0"))),
            "its own half, by tokens": loss(HeldDecoder(tuned, halves[owner][TOKENS])),
            "another owner's half": loss(HeldDecoder(tuned, other)),
            f"half at random, mean of {DRAWS}": statistics.mean(loss(HeldDecoder(tuned, drawn())) for _ in range(DRAWS)),
        }
    return result


if __name__ == "__main__":
    main()
