"""Models that do not fit this machine: what a job on them would cost, and one block of the largest really solved.

    .venv/bin/python bench/scale.py --write

Plans: checkpoints in the shapes of Llama 3 with 8 and 70 billion parameters whose weights are holes in a file, which takes no
disk; a plan reads no weights. The seconds are those of the plan, for a client that computes as fast as --rate says. By default
that is the rate at which this machine multiplies matrices of such a block, measured first.

The block: the statistics of every input are random sums of the full size, in the form in which clients send them; every linear
is pruned from them by the code that the server runs. Time and memory do not depend on the numbers.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import page
import torch
from accelerate import init_empty_weights
from shapes import TOKENIZER
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from fedgrove import api
from fedgrove.input_statistics import fixed_point
from fedgrove.models.files import small_contents
from fedgrove.models.masks import Target
from fedgrove.rounds.capabilities import SPEED
from fedgrove.stages.prune import pruners

SHAPES = {  # width, width of the feed-forward part, blocks, heads, heads of keys and values
    "8b": (4096, 14336, 32, 32, 8),
    "70b": (8192, 28672, 80, 64, 8),
}
VOCABULARY = 128256
CLIENTS = 8
STAGES = {
    "`fedspallm`, SparseGPT": {},
    "`fedprllm`, Wanda": {"aggregation": "fedprllm", "pruner": "wanda"},
    "`pooled`, Wanda": {"aggregation": "pooled", "pruner": "wanda"},
    "`pooled`, SparseGPT": {"aggregation": "pooled"},
    "`pooled`, SparseGPT, `mixed`": {"aggregation": "pooled", "mixed": True},
}
SAMPLES, LENGTH = 16, 2048  # windows of each client


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--block", choices=SHAPES, default="70b", help="the shape of the block that is solved")
    arguments.add_argument("--shrink", type=int, default=1, help="solve a block so many times narrower, for a quick look")
    arguments.add_argument("--rate", type=float, help="operations a second of a client; measured if left out")
    arguments.add_argument("--skip-block", action="store_true", help="plans only")
    arguments.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    given = arguments.parse_args()
    logging.set_verbosity_error()
    rate = given.rate or measured_rate()
    print(f"{rate / 1e9:.0f} billion operations a second")
    plans = plans_table(given.shapes, rate)
    print(plans)
    text = f"A client computes {rate / 1e9:.0f} billion operations a second, as this machine does.\n\n{plans}"
    if not given.skip_block:
        text += "\n\n" + block_table(given.block, given.shrink)
    if given.write:
        page.write("scale", text)


def measured_rate(size: int = 4096, tokens: int = 2048) -> float:
    """Floating-point operations a second of a matrix product of such a model, in float32: the fastest of five."""
    weight, x = torch.randn(size, size), torch.randn(tokens, size)
    spent = []
    for _ in range(5):
        since = time.perf_counter()
        x @ weight.T
        spent.append(time.perf_counter() - since)
    return 2 * tokens * size**2 / min(spent)


def plans_table(shapes: list[str], rate: float) -> str:
    """What a job costs each of eight clients, by aggregation."""
    lines = ["| 50 % | shape | memory | compute | upload, all blocks |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            model = hollow(Path(folder) / shape, shape)
            for name, stage in STAGES.items():
                client = next(iter(plan_of(model, stage, rate)["clients"].values()))
                memory, hours, upload = client["memory"] / 1e9, client["seconds"] / 3600, _bytes(client["upload"])
                lines.append(f"| {name} | {shape} | {memory:.1f} GB | {hours:.1f} h | {upload} |")
    return "\n".join(lines)


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def plan_of(model: Path, stage: dict[str, object], rate: float) -> dict[str, dict[str, dict[str, float]]]:
    """The plan of a pruning stage on a model, as JSON."""
    text = model.parent / "text.txt"
    text.write_text("word " * (SAMPLES * LENGTH), encoding="utf-8")
    clients = [{"name": f"client-{i}", "data": str(text), "speed": rate / SPEED} for i in range(CLIENTS)]
    job = {
        "name": "scale",
        "model": {"path": str(model)},
        "clients": clients,
        "stages": [{"kind": "prune", "sparsity": 0.5, "samples": SAMPLES, "length": LENGTH, **stage}],
        "evaluate": {"data": []},
    }
    (plan,) = api.plan(job, quiet=True)
    return json.loads(plan.model_dump_json())


def hollow(out: Path, shape: str) -> Path:
    """A checkpoint in bfloat16 whose weights are a hole in a file: zeros that take no disk."""
    width, feed_forward, depth, heads, key_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    out.mkdir(parents=True)
    for name, content in small_contents(TOKENIZER).items():
        if name.startswith(("tokenizer", "special")):
            (out / name).write_bytes(content)
    config.save_pretrained(out)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        block = name.removeprefix("model.layers.").partition(".")[0]
        files.setdefault(f"block-{block}.safetensors" if block.isdecimal() else "ends.safetensors", {})[name] = parameter.shape
    for file, tensors in files.items():
        _hole(out / file, tensors)
    places = {name: file for file, tensors in files.items() for name in tensors}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return out


def _hole(file: Path, tensors: dict[str, torch.Size]) -> None:
    """A safetensors file of which only the header is written."""
    entries, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + 2 * shape.numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(header)) + header)
        opened.truncate(8 + len(header) + offset)


def block_table(shape: str, shrink: int) -> str:
    """Prunes every linear of a block from sums; seconds of each input, and the peak of this process."""
    width, feed_forward, _, heads, key_heads = SHAPES[shape]
    width, feed_forward = width // shrink, feed_forward // shrink
    keys = width * key_heads // heads
    inputs = {"q, k, v": (width, [width, keys, keys]), "o": (width, [width]), "gate, up": (width, [feed_forward] * 2)}
    inputs["down"] = (feed_forward, [width])
    lines = ["| input of | channels | sums to statistics | SparseGPT, 50 % |", "|---|---|---|---|"]
    total = 0.0
    for name, (channels, outputs) in inputs.items():
        reading, solving = solve(channels, outputs)
        total += reading + solving
        lines.append(f"| {name} | {channels} | {reading:.0f} s | {solving:.0f} s |")
        print(lines[-1], flush=True)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines.append("")
    lines.append(f"One block in the shape of {shape}: {total / 60:.1f} minutes on {torch.get_num_threads()} threads, "
                 f"{peak / 1e9:.1f} GB at the peak of the process.")  # fmt: skip
    return "\n".join(lines)


def solve(channels: int, outputs: list[int]) -> tuple[float, float]:
    """Seconds to read the sums of an input, and to prune the linears that read it."""
    random = torch.Generator().manual_seed(0)
    products = torch.cat(list(_products(channels, random)))
    squares = torch.full((channels,), 2**30, dtype=torch.int64)
    since = time.perf_counter()
    known = fixed_point.finish(squares, products, torch.ones(channels), tokens=CLIENTS * SAMPLES * LENGTH)
    del products
    read = time.perf_counter()
    for rows in outputs:
        weight = torch.randn(rows, channels, generator=random)
        _, mask = pruners.prune("sparsegpt", weight, known, Target(0.5), "each")
        assert int((~mask).sum()) == rows * channels // 2
    return read - since, time.perf_counter() - read


def _products(channels: int, random: torch.Generator) -> Iterator[torch.Tensor]:
    """Sums of products far smaller than the squares, so that the matrix is positive definite; row by row."""
    largest = 2**29 // channels
    for row in range(channels - 1):
        yield torch.randint(-largest, largest, (channels - 1 - row,), generator=random)


if __name__ == "__main__":
    main()
