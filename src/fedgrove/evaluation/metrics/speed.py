"""Speed, memory and bytes of a model as plain transformers runs it, in a process that does nothing else.

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

PROMPT, WRITTEN = 256, 64  # tokens
REPEATS = 5


def speed(model: Path, dtype: str = "auto") -> dict[str, Measured]:
    """Measures a model directory in a new process.

    Returns:
        ``prefill`` and ``decode``: tokens a second, one prompt at a time, the median of five with the range of the five
        (no confidence interval: it is one machine, at one time). ``memory``: bytes at the peak, besides the libraries.
        ``disk``: bytes of all files of the directory.

    Zeros take part like any number: a pruned model in plain transformers is as fast as it was, and as large.

    Raises:
        FedgroveError: the process failed; says why.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(model), "--dtype", dtype],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it was killed: out of memory?"])[-1]
        raise FedgroveError(f"speed of {model}: {why}")
    timings: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return {name: Measured(*values) for name, values in timings.items()}


def measure(path: Path, dtype: str) -> dict[str, list[float]]:
    """What :func:`speed` returns, in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    config = AutoConfig.from_pretrained(path).get_text_config()
    room = getattr(config, "max_position_embeddings", None) or PROMPT + WRITTEN
    prompt = max(1, min(PROMPT, room * PROMPT // (PROMPT + WRITTEN)))
    written = max(2, min(WRITTEN, room - prompt))
    ids = torch.randint(0, config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    ids = ids.to("cuda" if gpu else "cpu")

    def load() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        return model.to(ids.device).eval()

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

    timed(load(), written)  # libraries load what they need when it is first used, and keep it: that is not the model's
    gc.collect()
    before = torch.cuda.memory_allocated() if gpu else _peak(anew=True)
    model = load()
    firsts = [timed(model, 1) for _ in range(REPEATS)]
    wholes = [timed(model, written) for _ in range(REPEATS)]
    first = statistics.median(firsts)
    prefills = [prompt / seconds for seconds in firsts]
    decodes = [(written - 1) / max(seconds - first, 1e-9) for seconds in wholes]
    memory = (torch.cuda.max_memory_allocated() if gpu else _peak()) - before
    disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "prefill": [statistics.median(prefills), min(prefills), max(prefills)],
        "decode": [statistics.median(decodes), min(decodes), max(decodes)],
        "memory": [float(memory)],
        "disk": [float(disk)],
    }


def _peak(anew: bool = False) -> int:
    """Bytes that this process held at most; ``anew``: from now on, as far as the system can (Linux)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if anew:
        Path("/proc/self/clear_refs").write_text("5")  # the libraries' own peak, while they were imported, is over
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.dtype)))
