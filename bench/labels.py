"""Which of 20 newsgroups a post is from, as a language model that eight unequal clients tuned together would answer.

    .venv/bin/python bench/labels.py --data ../shared/data --write

Clients, cards and the deal of labels (Dirichlet 0.3) are those of ``bench/tune.py``. A client learns the answer alone:
the prompt is the beginning of a post and "Topic:", the answer one or two words. A test post is given the label whose tokens are
the most likely (fedgrove.models.labels). Stand-alone: the mean over the eight clients' own models.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import page
import results
import torch
import tune
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fedgrove import server
from fedgrove.job import Job
from fedgrove.models.labels import accuracy, score_labels
from fedgrove.runs import Run, read_lines

WORDS = {
    "alt.atheism": "atheism", "comp.graphics": "graphics", "comp.os.ms-windows.misc": "windows",
    "comp.sys.ibm.pc.hardware": "computer parts", "comp.sys.mac.hardware": "Apple", "comp.windows.x": "display",
    "misc.forsale": "sale", "rec.autos": "cars", "rec.motorcycles": "motorcycles", "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey", "sci.crypt": "encryption", "sci.electronics": "electronics", "sci.med": "medicine",
    "sci.space": "space", "soc.religion.christian": "Christian", "talk.politics.guns": "guns",
    "talk.politics.mideast": "Israel", "talk.politics.misc": "politics", "talk.religion.misc": "religion",
}  # fmt: skip
CHARACTERS = 160  # of a post
LENGTH, STEPS, POSTS = 128, 8, 400
ROUNDS = {"fedpipe": 20, "lora": 10, "alone": 10}  # FedPipe's are shorter
RATE = 4e-3
PROMPT = "{text}\nTopic:"
NAMES = {"fedpipe": "FedPipe", "lora": "uniform LoRA", "alone": "stand-alone (mean)"}


def shorten(line: str) -> str:
    """A record with the beginning of its text, and its label as a word."""
    record = json.loads(line)
    text = " ".join(record["text"].split())[:CHARACTERS]
    return json.dumps({"text": text, "label": record["label"], "word": WORDS[record["label"]]})


def job(method: str, files: list[Path], first: int, seed: int, rounds: int, rate: float) -> Job:
    """The job of ``bench/tune.py``, with a prompt and an answer and nothing measured on the way."""
    plain = tune.job("newsgroups", method, [[file] for file in files], first, files[0], seed, rounds, rate).model_dump(
        mode="json"
    )
    for client in plain["clients"]:
        client |= {"text": None, "prompt": PROMPT, "answer": " {word}"}
    plain["stages"][0] |= {"measure": 0, "length": LENGTH, "steps": STEPS}
    return Job.model_validate({**plain, "evaluate": {}})


def measured(wanted: Job, folder: Path, test: list[dict[str, str]]) -> tuple[float, float]:
    """Runs a job: the accuracy of its model, and modelled seconds."""
    run = Run(folder / "run", wanted)
    engine = server.local_engine(wanted, run.path / "clients")
    try:
        server.main(wanted, engine, run)
    finally:
        engine.close()
        run.close()
    seconds = [line["value"] for line in read_lines(run.path / "metrics.jsonl") if line["name"] == "clock"][-1]
    return score(run.path / "model", test), seconds


def score(model: Path, test: list[dict[str, str]]) -> float:
    """The share of posts whose label a model finds the most likely."""
    labels = sorted(WORDS)
    prompts = [PROMPT.format(text=record["text"]) for record in test]
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    scores = score_labels(net, AutoTokenizer.from_pretrained(model), prompts, [f" {WORDS[label]}" for label in labels], LENGTH)
    return accuracy(scores, [labels.index(record["label"]) for record in test])


def run_method(data: Path, method: str, seed: int, rounds: int, rate: float, validate: bool) -> dict[str, Any]:
    """The accuracy of a method; stand-alone: of each client."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines, held = tune.held_out("newsgroups", data, folder, validate)
        test = [json.loads(shorten(line)) for line in held.read_text(encoding="utf-8").splitlines()]
        random.Random("test").shuffle(test)
        files = tune.deal("newsgroups", [shorten(line) for line in lines], folder, seed)
        found = []
        for i, part in enumerate([[file] for file in files] if method == "alone" else [files]):
            (folder / f"{i}").mkdir()
            wanted = job(method, part, i, seed, rounds, rate)
            found.append(measured(wanted, folder / f"{i}", test[:POSTS]))
    each = [accuracy for accuracy, _ in found]
    return {"accuracy": each, "seconds": max(seconds for _, seconds in found)}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: for each method the mean over seeds."""
    rows = ["| method | accuracy, mean over seeds | each seed | modelled time |", "|---|---|---|---|"]
    for method, name in NAMES.items():
        runs = [result for result in found if result["method"] == method]
        if runs:
            means = [statistics.mean(run["accuracy"]) for run in runs]
            each = ", ".join(f"{mean:.1%}" for mean in means)
            time = statistics.mean(run["seconds"] for run in runs)
            rows.append(f"| {name} | {statistics.mean(means):.1%} | {each} | {time:.1f} s |")
    return "\n".join(rows)


def main() -> None:
    """Runs what is asked and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with newsgroups")
    parser.add_argument("--methods", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[RATE], help="learning rates, of all methods")
    parser.add_argument("--results", type=Path, help="a JSON-lines file: what stands there is not run again")
    parser.add_argument("--validate", action="store_true", help="choose settings by a tenth of the training text, not the test")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted = [
        {"method": method, "seed": seed, "rounds": ROUNDS[method], "rate": rate, "validate": args.validate}
        for seed, method, rate in itertools.product(args.seeds, args.methods, args.rates)
    ]
    text = table(results.collect(args.results, wanted, functools.partial(run_method, args.data)))
    print(text)
    if args.write:
        page.write("labels", text)


if __name__ == "__main__":
    main()
