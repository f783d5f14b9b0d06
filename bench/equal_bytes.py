"""Five ways to 9/16 of the bytes of a model's linears, each before and after the same tuning: what is left, and how fast it is.

    .venv/bin/python bench/equal_bytes.py --data ../shared/data --model smollm2 --write
    .venv/bin/python bench/equal_bytes.py --data ../shared/data --model smollm2 --speed --llama PYTHON --write

Half of the weights zero take 9/16 of the bytes (with one bit a weight that says where they are); blocks, or channels and heads,
are cut down to as many. Four owners; the text measured is held out by each. The runs' folders stay under ``--runs``;
results are kept in bench/equal_bytes.jsonl. ``--speed`` times the models of these folders, in turn, in plain transformers, and
with ``--llama``, a Python that has the package xllamacpp, in llama.cpp too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import page
import torch
from arguments import existing_folder
from owners import plain_files
from results import Kept
from structured import NEW, PROMPT, seconds_of
from transformers import AutoModelForCausalLM

from fedgrove import api
from fedgrove.job.tables import Job
from fedgrove.models.stream import Checkpoint
from fedgrove.models.width import width_of

OWNERS = ("medquad", "pubmedqa", "rust", "shakespeare")
RESULTS = Path(__file__).with_suffix(".jsonl")
CUT = 7 / 16
LLAMA = """
import json, sys, urllib.request
from xllamacpp import CommonParams, Server
parameters = CommonParams()
parameters.model.path, parameters.n_parallel, parameters.port = sys.argv[1], 1, 8431
read, write, threads, repeats = map(int, sys.argv[2:])
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
server = Server(parameters)
body = {"prompt": list(range(1000, 1000 + read)), "n_predict": write, "ignore_eos": True, "cache_prompt": False}
headers = {"Content-Type": "application/json"}
for attempt in range(repeats + 1):
    request = urllib.request.Request("http://127.0.0.1:8431/completion", json.dumps(body).encode(), headers)
    timings = json.load(urllib.request.urlopen(request))["timings"]
    if attempt:
        print("timings", timings["prompt_per_second"], timings["predicted_per_second"], flush=True)
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=existing_folder, required=True, help="the folder with the owners' texts")
    arguments.add_argument("--model", type=existing_folder, required=True, help="a folder")
    arguments.add_argument("--runs", type=Path, default=Path("runs/equal-bytes"), help="a folder for the runs")
    arguments.add_argument("--samples", type=int, default=8, help="calibration windows of each owner")
    arguments.add_argument("--length", type=int, default=512, help="tokens of these windows, and of held-out ones")
    arguments.add_argument("--rounds", type=int, default=2, help="of tuning: LoRA of rank 16 in every linear")
    arguments.add_argument("--steps", type=int, default=8, help="of each owner in a round, 2 windows of 256 tokens each")
    arguments.add_argument("--windows", type=int, default=4, help="held-out windows of each owner")
    arguments.add_argument("--records", type=int, default=16, help="medical questions whose answers are generated")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--rows", nargs="+", help="only the rows that contain one of these words")
    arguments.add_argument("--speed", action="store_true", help="time the models of the runs' folders instead")
    arguments.add_argument("--llama", help="a Python that has xllamacpp, to time llama.cpp too")
    arguments.add_argument("--repeats", type=int, default=5, help="for --speed")
    arguments.add_argument("--kept", action="store_true", help="measure nothing: the table of what is kept")
    arguments.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    api.hush()
    text = speed(given) if given.speed else quality(given)
    print(text)
    if given.write:
        page.write("equal-bytes-speed" if given.speed else "equal-bytes", text)


def rows(model: Path) -> dict[str, list[dict[str, Any]]]:
    """The stages before the tuning, by row."""
    width = {"kind": "structured", "depth": 0.0, "score": "fisher", **fractions(model)}
    prune = {"kind": "prune", "aggregation": "pooled"}
    return {
        "dense": [],
        "fewer blocks": [{"kind": "structured", "depth": CUT}],
        "narrower": [{**width, "repair": False}],
        "narrower, repaired": [width],
        "2:4": [{**prune, "pattern": "2:4"}],
        "half of the weights": [{**prune, "sparsity": 0.5}],
    }


def fractions(model: Path) -> dict[str, float]:
    """Of channels and heads to cut, so that the blocks' linears lose :data:`CUT` of their weights and lose heads alike."""
    config = Checkpoint(model).config
    width = width_of(config)
    heads = int(CUT * width.heads) / width.heads
    head = config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * head * (config.num_attention_heads + config.num_key_value_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    channels = round((CUT * (attention + mlp) - heads * attention) / mlp * width.channels)
    return {"channels": (channels + 0.5) / width.channels, "heads": CUT if heads else 0.0}


def quality(given: argparse.Namespace) -> str:
    """Runs what is not kept, and gives the table."""
    kept = Kept(RESULTS, given.model, only=given.kept)
    names = ("samples", "length", "rounds", "steps", "windows", "records", "seed")
    settings = {name: getattr(given, name) for name in names}
    lines = [
        "| | MB | perplexity | ROUGE-L of answers | tuned: perplexity | ROUGE-L |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        files = dict(plain_files(given.data, Path(folder)))
        for row, stages in rows(given.model).items():
            if given.rows and not any(word in row for word in given.rows):
                continue
            found = kept(partial(measure, row, stages, files, given), row=row, **settings)
            if found:
                numbers = [f"{found['megabytes']:.0f}", *(f"{value:.1f}" for value in found["numbers"])]
                lines.append(f"| {row} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def measure(row: str, stages: list[dict[str, Any]], files: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and ROUGE-L before and after the tuning; the folder's megabytes, packed if half of its weights are zero."""
    calibration = {"samples": given.samples} | ({"length": given.length} if stages else {})
    tune = {
        "kind": "tune", "method": "lora", "rounds": given.rounds, "steps": given.steps, "batches": [2], "ranks": [16],
        "bits": [16], "length": 256, "learning_rate": 1e-3, "lr_schedule": "linear",
    }  # fmt: skip
    texts = [{"name": owner, "path": str(files[f"{owner}-heldout"])} for owner in OWNERS]
    answers = {
        "name": "answers", "path": str(given.data / "medquad" / "test.jsonl"), "measure": "generation",
        "prompt": "{question}\n", "answer": "{answer}",
    }  # fmt: skip
    job = {
        "name": "equal-bytes",
        "seed": given.seed,
        "model": {"path": str(given.model)},
        "clients": [{"name": owner, "data": str(files[owner])} for owner in OWNERS],
        "stages": [*({**stage, **calibration} for stage in stages), tune],
        "evaluate": {
            "data": [*texts, answers], "windows": given.windows, "length": given.length, "records": given.records, "tokens": 48,
        },
    }  # fmt: skip
    run = folder_of(given, row)
    summary = api.run(Job.model_validate(job), run, quiet=True, resume=run.is_dir()).summary
    before = summary.after[0] if stages else summary.dense
    stage = 0 if stages else None
    numbers = []
    for perplexities, at in ((before, stage), (summary.federated, len(stages))):
        numbers += [summary.mean(perplexities), 100 * summary.rounds_measured[at, None, None, "rougeL/answers"]]
    form = "packed" if row in ("2:4", "half of the weights") else "hf"
    folder = write(run, form, given)
    return {"numbers": numbers, "megabytes": sum(file.stat().st_size for file in folder.glob("model*")) / 1e6}


def folder_of(given: argparse.Namespace, row: str) -> Path:
    """The run folder of a row."""
    path: Path = given.runs / row.replace(",", "").replace(":", "-").replace(" ", "-")
    return path


def write(run: Path, form: str, given: argparse.Namespace) -> Path:
    """Exports a run's result, if that has not been done."""
    out = run / form
    if not out.is_dir():
        fedgrove = Path(sys.executable).parent / "fedgrove"
        subprocess.run(
            [fedgrove, "export", run, "--to", form, "--out", out, "--no-measure"], check=True, stdout=subprocess.DEVNULL
        )
    return out


def speed(given: argparse.Namespace) -> str:
    """The table of tokens per second."""
    runs = {row: folder_of(given, row) for row in rows(given.model) if (folder_of(given, row) / "model").is_dir()}
    loaded = {row: AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval() for row, run in runs.items()}
    seconds = seconds_of(loaded, given.repeats)
    head = f"| tokens/s | transformers, reading {PROMPT} | writing {NEW} more |"
    lines = [
        head + (" llama.cpp, reading | writing |" if given.llama else ""),
        "|---|---|---|" + ("---|---|" if given.llama else ""),
    ]
    for row, run in runs.items():
        cells = [PROMPT / statistics.median(seconds[row]["read"]), NEW / statistics.median(seconds[row]["write"])]
        if given.llama:
            model = write(run, "gguf", given) / "model.gguf"
            numbers = [PROMPT, NEW, given.threads, given.repeats]
            said = subprocess.run(
                [given.llama, "-c", LLAMA, str(model), *map(str, numbers)], check=True, capture_output=True, text=True
            )
            timings = [line.split()[1:] for line in said.stdout.splitlines() if line.startswith("timings")]
            cells += [statistics.median(float(one[column]) for one in timings) for column in (0, 1)]
        lines.append(f"| {row} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
