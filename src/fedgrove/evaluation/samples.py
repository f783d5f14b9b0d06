"""What the model writes, before and after: from prompts that the job names, and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from fedgrove.events import Phase
from fedgrove.models.stream import find_model
from fedgrove.runfolder import RunFolder

FILE = "samples.json"
TOKENS = 40  # written at most


def write_samples(run: RunFolder) -> None:
    """Writes ``RUN/samples.json``: for each of the job's prompts what the first and the last model write after it.

    Both models are loaded whole, by plain transformers, one after the other. What is there already is not written again.
    """
    prompts, model = run.job.evaluate.prompts, run.job.model
    if not prompts or (run.path / FILE).is_file():
        return
    run.phase(Phase("samples", "the model as it came"))
    before = _write(find_model(model.path, model.revision), prompts, model.dtype)
    run.phase(Phase("samples", "the result"))
    after = _write(run.path / "model", prompts, "auto")
    rows = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]
    run.write_json(FILE, {"tokens": TOKENS, "samples": rows})


def _write(folder: Path, prompts: tuple[str, ...], dtype: str) -> list[str]:
    """What a model writes after each prompt, always with the most likely token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = cast(Any, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)).eval()
    written = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.eos_token_id,
            )
        written.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return written
