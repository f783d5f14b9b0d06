"""Speed, memory and size of a model in plain transformers, measured in a separate process.

``python -m fedgrove.evaluation.metrics.speed MODEL`` prints them as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedgrove.errors import FedgroveError
from fedgrove.evaluation.metrics import Measured

PROMPT, GENERATED = 256, 64  # tokens
REPEATS = 5


def speed(model: Path, dtype: str = "auto") -> dict[str, Measured]:
    """Measures a model directory in a new process.

    Returns:
        ``prefill`` and ``decode``: tokens per second with one prompt at a time, the median of five runs with their range,
        which is not a confidence interval: it describes one machine at one time. ``memory``: the peak in bytes, without
        the libraries. ``disk``: bytes of all files of the directory.

    Plain transformers computes zeros like other numbers, so unstructured pruning makes a model neither faster nor
    smaller there.

    Raises:
        FedgroveError: the process failed; says why.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(
        [sys.executable, "-m", __name__, str(model), "--dtype", dtype],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if process.returncode:
        why = (process.stderr.strip().splitlines() or ["it was killed: out of memory?"])[-1]
        raise FedgroveError(f"speed of {model}: {why}")
    measured: dict[str, list[float]] = json.loads(process.stdout.splitlines()[-1])
    return {name: Measured(*values) for name, values in measured.items()}


def measure(path: Path, dtype: str) -> dict[str, list[float]]:
    """Measures what :func:`speed` returns, in this process."""
    import torch

    from fedgrove.models.pretrained import load_full_model, read_config

    gpu = torch.cuda.is_available()
    config = read_config(path).get_text_config()
    max_tokens = getattr(config, "max_position_embeddings", None) or PROMPT + GENERATED
    prompt = max(1, min(PROMPT, max_tokens * PROMPT // (PROMPT + GENERATED)))
    generated = max(2, min(GENERATED, max_tokens - prompt))
    ids = torch.randint(0, config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to("cuda" if gpu else "cpu")

    def load() -> Any:
        return load_full_model(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype)).to(ids.device)

    def timed(model: Any, tokens: int) -> float:
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, pad_token_id=0,
                min_new_tokens=tokens, max_new_tokens=tokens,
            )  # fmt: skip
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(load(), generated)  # libraries allocate memory when they are first used, which does not count as the model's
    gc.collect()
    before = torch.cuda.memory_allocated() if gpu else _peak(reset=True)
    model = load()
    prefill_seconds = [timed(model, 1) for _ in range(REPEATS)]
    total_seconds = [timed(model, generated) for _ in range(REPEATS)]
    first = statistics.median(prefill_seconds)
    prefills = [prompt / seconds for seconds in prefill_seconds]
    decodes = [(generated - 1) / max(seconds - first, 1e-9) for seconds in total_seconds]
    memory = (torch.cuda.max_memory_allocated() if gpu else _peak()) - before
    disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "prefill": [statistics.median(prefills), min(prefills), max(prefills)],
        "decode": [statistics.median(decodes), min(decodes), max(decodes)],
        "memory": [float(memory)],
        "disk": [float(disk)],
    }


def _peak(reset: bool = False) -> int:
    """The peak memory of this process in bytes; ``reset`` starts a new measurement, where the system supports it (Linux)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak from importing libraries
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.dtype)))
