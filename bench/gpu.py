"""What fedgrove does on one GPU: kernel, solver, pruning, tuning, and what 2:4 zeros are worth in plain transformers.

    bash bench/gpu.sh --out results                                            # on a machine with a GPU and torch
    .venv/bin/python bench/gpu.py --write results/gpu.json                     # its tables into docs/benchmarks.md
    bash bench/gpu.sh --cpu-check                                              # every part at a tiny size, without a GPU

Each part runs in a process of its own with a time limit, prints its rows as it goes, and adds them to gpu.json; a part that
fails says so there, and the next one begins. Checkpoints have random parameters, because only time and memory are measured.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import page
import shapes
import solver
import torch
from torch import Tensor, nn

from fedgrove.events import Event, Listener, Phase
from fedgrove.files import read_lines
from fedgrove.job.load import parse
from fedgrove.models.masks import Target
from fedgrove.run import local_engine, run_job
from fedgrove.runfolder import RunFolder

Row = dict[str, Any]
DEMO = shapes.TOKENIZER.parent
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="folder of gpu.json")
    arguments.add_argument("--work", type=Path, default=Path("/tmp/fedgrove-gpu"), help="folder of checkpoints and runs")
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments.add_argument("--limit", type=int, default=240, help="seconds that a part may take")
    arguments.add_argument("--blocks", type=int, help="of the checkpoints, to look at a part more closely; default: all")
    arguments.add_argument("--cpu-check", action="store_true", help="tiny sizes, on a CPU")
    arguments.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a child process runs
    arguments.add_argument("--write", type=Path, help="measure nothing: the tables of this gpu.json into docs/benchmarks.md")
    given = arguments.parse_args()
    if given.write:
        page.write("gpu", tables(json.loads(given.write.read_text())))
        return
    if not (GPU or given.cpu_check):
        sys.exit("torch sees no GPU here; --cpu-check runs every part at a tiny size")
    given.out.mkdir(parents=True, exist_ok=True)
    given.work.mkdir(parents=True, exist_ok=True)
    if given.part:
        PARTS[given.part](given)
        return
    file = given.out / "gpu.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found["machine"] = machine()
    failed = []
    for part in given.parts:
        print(f"--- {part}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, __file__, "--part", part, "--out", str(given.out), "--work", str(given.work)]
        try:
            more = ["--cpu-check"] * given.cpu_check + (["--blocks", str(given.blocks)] if given.blocks else [])
            status = subprocess.run(command + more, timeout=given.limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = -1
        rows = read_lines(given.out / f"{part}.jsonl") if (given.out / f"{part}.jsonl").exists() else []
        found[part] = {"rows": rows, "seconds": round(time.perf_counter() - start, 1)}
        if status:
            found[part]["failed"] = "its time was up" if status == -1 else f"status {status}"
            failed.append(part)
        (given.out / f"{part}.jsonl").unlink(missing_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"--- {part}: {found[part]['seconds']} s {found[part].get('failed', '')}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def machine() -> dict[str, str]:
    """The card and the versions that the numbers belong to."""
    import transformers

    card = torch.cuda.get_device_name() if GPU else f"CPU {platform.processor() or platform.machine()}"
    return {
        "card": card, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "transformers": transformers.__version__,
        "cores": str(os.cpu_count()),
    }  # fmt: skip


def say(given: argparse.Namespace, **row: Any) -> None:
    """Prints a row and keeps it."""
    print(json.dumps(row), flush=True)
    with (given.out / f"{given.part}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def seconds(work: Callable[[], Any], runs: int = 5, warm: int = 1) -> float:
    """The median of some runs, after those that do not count."""
    times = [solver.clock(work, DEVICE)[0] for _ in range(warm + runs)]
    return statistics.median(times[warm:])


def peaks() -> dict[str, float]:
    """The most memory since the start of the process, in GB: that of tensors on the GPU, and of the process."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if GPU else 0.0, "host_gb": round(host, 2)}


def kernel(given: argparse.Namespace) -> None:
    """Triton's kernel beside the torch loop, on one block of 128 columns."""
    from fedgrove.stages.prune.pruners import sparsegpt

    fast = sparsegpt.gpu_kernel(torch.device("cuda:0")) if GPU else sparsegpt.columns
    if fast is None:
        sys.exit("the kernel does not work on this card")
    for num_out in (64,) if given.cpu_check else (4096, 11008):
        part = torch.randn(128, num_out, device=DEVICE)
        step = torch.randn(128, 128, device=DEVICE).mul_(0.1).triu_()
        step.diagonal().fill_(1.0)
        cost = torch.rand(128, 1, device=DEVICE) + 0.5
        pruned = (torch.rand(128, num_out, device=DEVICE) < 0.5).float()
        for target in (Target(0.5), Target.of(None, (2, 4)), Target.of(None, (4, 8))):
            work = [functools.partial(_one_block, way, part, pruned, step, cost, target) for way in (sparsegpt.columns, fast)]
            (expected, gone), (got, also) = (one() for one in work)
            slow, quick = (seconds(one, 20) for one in work)
            alike = (gone == also).all(0)
            error = float((got - expected)[:, alike].norm() / expected[:, alike].norm())
            say(given, rows=num_out, target=str(target), torch_ms=round(slow * 1e3, 3), triton_ms=round(quick * 1e3, 3),
                masks_differ=float((gone != also).double().mean()), relative_error=error)  # fmt: skip


def _one_block(
    solve: Callable[..., None], part: Tensor, pruned: Tensor, step: Tensor, cost: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    part, pruned = part.clone(), pruned.clone()
    solve(part, pruned, torch.empty_like(part), step, cost, target.pattern)
    return part, pruned


def solve(given: argparse.Namespace) -> None:
    """SparseGPT of one matrix beside the published loop, factorization included."""
    from fedgrove.input_statistics.statistics import InputStatistics
    from fedgrove.stages.prune.pruners import sparsegpt

    for num_out, num_in in ((64, 256),) if given.cpu_check else ((4096, 4096), (4096, 11008)):
        weight, inputs = solver.made_up(num_out, num_in, DEVICE)
        for target in (Target(0.5), Target.of(None, (2, 4))):
            slow, fast, masks = [], [], []
            for _ in range(4):  # the first compiles
                taken, expected = solver.clock(lambda: solver.published(weight, inputs.gram, target), DEVICE)  # noqa: B023
                slow.append(taken)
                anew = InputStatistics("gram", inputs.tokens, inputs.gram)
                taken, (_, mask) = solver.clock(lambda: sparsegpt.prune(weight.clone(), anew, target), DEVICE)  # noqa: B023
                fast.append(taken)
                masks.append(mask)
            say(given, out=num_out, inputs=num_in, target=str(target), published=statistics.median(slow[1:]),
                fedgrove=statistics.median(fast[1:]), masks_differ=float((masks[-1] != (expected != 0)).double().mean()),
                same_bits=all(torch.equal(masks[0], mask) for mask in masks))  # fmt: skip


def text(given: argparse.Namespace, tokens: int) -> Path:
    """The demo's texts, their paragraphs shuffled again and again until they are long enough."""
    file = given.work / f"text-{tokens}.txt"
    if not file.exists():
        paragraphs = "".join(path.read_text() for path in sorted((DEMO / "texts").glob("*.txt"))).split("\n\n")
        parts: list[str] = []
        while sum(map(len, parts)) < 5 * tokens:
            random.Random(len(parts)).shuffle(paragraphs)
            parts += paragraphs
        file.write_text("\n\n".join(parts))
    return file


def checkpoint(given: argparse.Namespace, shape: str) -> Path:
    """Random parameters in bfloat16, made once."""
    out: Path = given.work / ("tiny" if given.cpu_check else f"{shape}-{given.blocks or 'all'}")
    if not out.exists():
        shapes.make(out, "tiny" if given.cpu_check else shape, shapes.TOKENIZER, torch.bfloat16, given.blocks, fast=GPU)
    return out


class Blocks(Listener):
    """When the work on each block began."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, Phase) and (event.block is not None or event.action == "write"):
            self.begun.append(time.perf_counter())

    def per_block(self) -> float:
        """The median; the first block also compiles and tokenizes."""
        taken = [later - earlier for earlier, later in itertools.pairwise(self.begun)]
        return statistics.median(taken[1:] or taken)


def run(
    given: argparse.Namespace, name: str, model: Path, data: Path, stage: Row, listener: Listener | None = None
) -> tuple[Path, float]:
    """A job of one client; returns the run folder and its seconds."""
    out = given.work / name
    subprocess.run(["rm", "-rf", str(out)], check=True)
    job = {
        "name": "bench", "seed": 0, "model": {"path": str(model)}, "clients": [{"name": "only", "data": str(data)}],
        "stages": [stage],
    }  # fmt: skip
    start = time.perf_counter()
    wanted = parse(job, given.work)
    folder = RunFolder(out, wanted, listener=listener or Listener())
    try:
        engine = local_engine(wanted, out / "clients")
        run_job(wanted, engine, folder, engine.device)
    finally:
        folder.close()
    return out, time.perf_counter() - start


def prune(given: argparse.Namespace, shape: str, **settings: Any) -> None:
    """A whole checkpoint, from the job to the saved model: 128 windows of 2048 tokens."""
    samples, length = (4, 64) if given.cpu_check else (128, 2048)
    model = checkpoint(given, shape)
    stage = {"kind": "prune", "pruner": "sparsegpt", "samples": samples, "length": length, **settings}
    blocks = Blocks()
    out, taken = run(given, f"pruned-{given.part}", model, text(given, samples * length), stage, blocks)
    size = (model / "model.safetensors").stat().st_size / 2e9
    ends = [(out / name).stat().st_mtime for name in ("plan-0-prune.json", "pruning.json")]
    say(given, shape=shape, blocks=len(blocks.begun) - 1, billions=round(size, 2), **settings, whole=round(taken, 1),
        pruning=round(ends[1] - ends[0], 1), per_block=round(blocks.per_block(), 2), **peaks())  # fmt: skip


def prune_1b(given: argparse.Namespace) -> None:
    prune(given, "1.1b", sparsity=0.5)


def prune_1b_pooled(given: argparse.Namespace) -> None:
    prune(given, "1.1b", sparsity=0.5, aggregation="pooled")


def prune_7b(given: argparse.Namespace) -> None:
    prune(given, "7b", pattern="2:4")


def bits(given: argparse.Namespace) -> None:
    """The same job twice on this device."""
    model, data = shapes.TOKENIZER, DEMO / "texts" / "software.txt"
    stage = {"kind": "prune", "pruner": "sparsegpt", "sparsity": 0.5, "samples": 8, "length": 512}
    for kind, wanted in (
        ("prune", stage),
        ("tune", {"kind": "tune", "planner": "uniform", "batches": [4], "rounds": 2, "steps": 4, "length": 128}),
    ):
        hashes = []
        for number in range(2):
            out, _ = run(given, f"bits-{kind}-{number}", model, data, wanted)
            hashes.append(hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest())
        say(given, kind=kind, same_bits=hashes[0] == hashes[1], sha256=hashes[0][:16])


def tune(given: argparse.Namespace) -> None:
    """LoRA of rank 8 in every linear beside a plain peft loop of as many windows: tokens per second and memory.

    Of fedgrove the last round counts, with what lies between two rounds: the message, the mean, the server's new adapters.
    """
    model = checkpoint(given, "1.1b")
    batch, length, steps = (2, 32, 2) if given.cpu_check else (4, 1024, 10)
    tokens = steps * batch * length
    for width in (16, 4):
        stage = {
            "kind": "tune", "planner": "uniform", "ranks": [8], "batches": [batch], "bits": [width], "rounds": 3,
            "steps": steps, "length": length, "learning_rate": 1e-4,
        }  # fmt: skip
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        out, _ = run(given, f"tuned-{width}", model, text(given, 3 * tokens), stage)
        ends = [line["time"] for line in read_lines(out / "metrics.jsonl") if line["name"] == "clock"]
        say(given, tool="fedgrove", bits=width, tokens_per_s=round(tokens / (ends[-1] - ends[-2])), **peaks())
        if GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        say(given, tool="peft", bits=width, tokens_per_s=round(peft_loop(model, width, batch, length, steps)), **peaks())


def peft_loop(path: Path, width: int, batch: int, length: int, steps: int) -> float:
    """Tokens per second of what a user would write with transformers and peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    small = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map=DEVICE, **({"quantization_config": small} if width == 4 else {})
    )
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    ids = torch.randint(0, 1000, (batch, length), device=DEVICE)

    def work() -> None:
        for _ in range(steps):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps * batch * length / seconds(work, 2)


def prefill(given: argparse.Namespace) -> None:
    """A model whose linears hold 2:4 zeros, in plain transformers: dense, and with torch's semi-structured weights."""
    from torch.sparse import to_sparse_semi_structured
    from transformers import AutoModelForCausalLM

    found = [given.work / f"pruned-{part}" / "model" for part in ("prune_7b", "prune_1b")]
    path = next((folder for folder in found if folder.exists()), None)
    if path is None or not (path.parent / "pruning.json").exists():
        path = checkpoint(given, "1.1b")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=DEVICE).eval()
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]
    ids = torch.randint(0, 1000, (1, 64) if given.cpu_check else (8, 1024), device=DEVICE)

    def work() -> None:
        model.model(input_ids=ids, use_cache=False)  # the head is dense in both

    with torch.inference_mode():
        for module in linears:  # what is not 2:4 yet becomes so: time does not depend on which weights are zero
            groups = module.weight.data.view(-1, 4)
            if int((groups != 0).sum(1).max()) > 2:
                groups[:, 2:] = 0
        dense = seconds(work)
        say(given, model=path.parent.name, weights="dense", tokens_per_s=round(ids.numel() / dense), **peaks())
        if not GPU:
            say(given, weights="2:4", failed="semi-structured weights need a GPU")
            return
        for module in linears:
            module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.data), requires_grad=False)
        sparse = seconds(work)
        say(
            given,
            model=path.parent.name,
            weights="2:4",
            tokens_per_s=round(ids.numel() / sparse),
            ratio=round(dense / sparse, 2),
        )


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "kernel": kernel, "solver": solve, "bits": bits, "prune_1b": prune_1b, "prune_1b_pooled": prune_1b_pooled, "tune": tune,
    "prune_7b": prune_7b, "prefill": prefill,
}  # fmt: skip


def tables(found: dict[str, Any]) -> str:
    """Markdown: the machine, then a table for each part."""
    about = found["machine"]
    versions = f"torch {about['torch']}, transformers {about['transformers']}"
    lines = [f"{about['card']}, {about['cores']} cores, {about['date']}, {versions}."]
    for part in filter(found.__contains__, PARTS):
        rows = found[part]["rows"]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines += ["", f"`{part}`:", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(shown(row.get(name, "")) for name in columns) + " |" for row in rows]
        lines += ["", f"It did not end: {found[part]['failed']}."] if found[part].get("failed") and not rows else []
    return "\n".join(lines)


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else str(value)


if __name__ == "__main__":
    main()
