"""Which of 20 newsgroups a post is from, by a linear head on the model that eight unequal clients tuned together.

    .venv/bin/python bench/labels.py --data ../shared/data --write

Clients, their capabilities, the distribution of labels (Dirichlet 0.3) and the tuning are those of ``bench/tune.py``, but what
is learnt is a post's topic after its beginning. A post's features are the mean of the last hidden states of that beginning. The
head is ridge regression on them, which needs only sums from the clients, and the clients' sums are those of their posts in one
place: so the heads of FedPipe and uniform LoRA see the same posts and differ only by the model. Stand-alone: each client's own
model with a head from its own posts, the mean of the eight.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import page
import results
import torch
import tune
from arguments import existing_folder
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from fedgrove import api
from fedgrove.files import read_lines
from fedgrove.job.tables import Job

LENGTH, AT_ONCE = 48, 32  # tokens of a post, and posts computed at once
PROMPT, ANSWER = "{text}\nTopic:", " {label}"
RIDGE = 0.1  # of the number of posts, on standardized features
ROUNDS = {"none": 0, "fedpipe": 12, "lora": 4, "lora-quarter": 4, "alone": 4}
STAGES: dict[str, dict[str, Any]] = {
    "fedpipe": {"steps": 16, "learning_rate": 4e-3},
    "lora": {"steps": 4, "learning_rate": 4e-3},
    "lora-quarter": {"steps": 16, "batches": [4], "learning_rate": 4e-3},
    "alone": {"steps": 4, "learning_rate": 2e-3},
}
NAMES = {
    "none": "no tuning",
    "fedpipe": "FedPipe",
    "lora": "uniform LoRA",
    "lora-quarter": "uniform LoRA, 16 small steps",
    "alone": "stand-alone (mean)",
}


def job(method: str, files: list[Path], first: int, seed: int) -> Job:
    """The job of ``bench/tune.py``, but what is learnt is the topic, and nothing is measured on the way."""
    stage = {"rounds": ROUNDS[method], **STAGES[method]}
    whole = tune.job("newsgroups", method, [[f] for f in files], first, files[0], seed, **stage)
    plain = whole.model_dump(mode="json")
    for client in plain["clients"]:
        del client["text"]
        client |= {"prompt": PROMPT, "answer": ANSWER}
    plain["stages"][0]["eval_every"] = 0
    return Job.model_validate({**plain, "evaluate": {}})


def tuned(wanted: Job, folder: Path) -> tuple[Path, float]:
    """Runs a job: its model, and modeled seconds."""
    run = api.run(wanted, folder / "run", quiet=True)
    return run.path / "model", [line["value"] for line in read_lines(run.path / "metrics.jsonl") if line["name"] == "clock"][-1]


class Posts:
    """Posts as features and labels: (posts, width) float64, and (posts, labels) of zeros and ones."""

    def __init__(self, model: Path, file: Path, labels: Sequence[str]):
        net, tokenizer = AutoModel.from_pretrained(model, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(model)
        records = read_lines(file)
        ids = [tokenizer(PROMPT.format(**record))["input_ids"] for record in records]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        self.features = torch.empty(len(ids), net.config.hidden_size, dtype=torch.float64)
        with torch.inference_mode():
            for at in (order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)):
                padded = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in at], batch_first=True)
                real = torch.arange(padded.shape[1]) < torch.tensor([len(ids[i]) for i in at])[:, None]
                hidden = net(input_ids=padded, attention_mask=real.long()).last_hidden_state.double()
                self.features[at] = (hidden * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)
        index = torch.tensor([labels.index(record["label"]) for record in records])
        self.labels = nn.functional.one_hot(index, len(labels)).double()

    def sums(self) -> Tensor:
        """Σ (x, y, 1)ᵀ(x, y, 1): all that a client sends for the head."""
        rows = torch.cat([self.features, self.labels, torch.ones(len(self.labels), 1, dtype=torch.float64)], 1)
        return rows.T @ rows

    def accuracy(self, sums: Tensor) -> float:
        """The accuracy on these posts of the head that follows from the sums."""
        width = self.features.shape[1]
        mean = sums[-1] / sums[-1, -1]
        covariance = sums / sums[-1, -1] - torch.outer(mean, mean)
        scale = covariance.diagonal()[:width].clamp_min(1e-12).sqrt()
        within = covariance[:width, :width] / torch.outer(scale, scale) + RIDGE * torch.eye(width, dtype=torch.float64)
        head = torch.linalg.solve(within, covariance[:width, width:-1] / scale[:, None])
        scores = (self.features - mean[:width]) / scale @ head + mean[width:-1]
        return float((scores.argmax(1) == self.labels.argmax(1)).double().mean())


def shorten(file: Path) -> Path:
    """Keeps only the beginning of each post."""
    tokenizer = AutoTokenizer.from_pretrained(tune.MODEL)
    records = read_lines(file)
    for record in records:
        record["text"] = tokenizer.decode(tokenizer(record["text"])["input_ids"][:LENGTH])
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def run_method(data: Path, method: str, seed: int) -> dict[str, Any]:
    """The accuracy of a method, and its modeled seconds; stand-alone: of each client."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines, held = tune.held_out("newsgroups", data, folder, validate=False)
        test = shorten(held)
        files = [shorten(file) for file in tune.deal("newsgroups", lines, folder, seed)]
        labels = sorted({json.loads(line)["label"] for line in lines})
        found = []
        for i, part in enumerate([[file] for file in files] if method == "alone" else [files]):
            model, seconds = (tune.MODEL, 0.0)
            if method != "none":
                (folder / f"{i}").mkdir()
                model, seconds = tuned(job(method, part, i, seed), folder / f"{i}")
            sums = [Posts(model, file, labels).sums() for file in part]
            found.append((Posts(model, test, labels).accuracy(torch.stack(sums).sum(0)), seconds))
    return {"accuracy": [accuracy for accuracy, _ in found], "seconds": max(seconds for _, seconds in found)}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: for each method the mean over seeds."""
    rows = ["| method | accuracy, mean over seeds | each seed | modeled time |", "|---|---|---|---|"]
    for method, name in NAMES.items():
        runs = [result for result in found if result["method"] == method]
        if runs:
            means = [statistics.mean(run["accuracy"]) for run in runs]
            each = ", ".join(f"{mean:.1%}" for mean in means)
            time = statistics.mean(run["seconds"] for run in runs)
            rows.append(f"| {name} | {statistics.mean(means):.1%} | {each} | {time:.1f} s |")
    return "\n".join(rows)


def main() -> None:
    """Runs the methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=existing_folder, required=True, help="the folder with newsgroups")
    parser.add_argument("--methods", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    args = parser.parse_args()
    api.hush()
    torch.set_num_threads(1)
    wanted = [{"method": method, "seed": seed} for seed, method in itertools.product(args.seeds, args.methods)]
    kept = results.Kept(args.results, tune.MODEL)
    text = table([
        {**settings, **kept(functools.partial(run_method, args.data, **settings), **settings)} for settings in wanted
    ])  # fmt: skip
    print(text)
    if args.write:
        page.write("labels", text)


if __name__ == "__main__":
    main()
