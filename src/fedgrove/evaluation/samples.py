"""Texts that the model generates before and after the run, from the job's prompts only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from fedgrove.data.tokens import encode_prompt
from fedgrove.events import Phase
from fedgrove.models.files import find_model
from fedgrove.models.pretrained import load_full_model, read_tokenizer
from fedgrove.runfolder import RunFolder

FILE = "samples.json"
TOKENS = 40  # generated at most


def write_samples(run: RunFolder) -> None:
    """Writes ``RUN/samples.json``: for each of the job's prompts, the continuations by the base model and by the result.

    Both full models are loaded by plain transformers, one after the other. An existing file is kept.
    """
    prompts, model = run.job.evaluate.prompts, run.job.model
    if not prompts or (run.path / FILE).is_file():
        return
    run.phase(Phase("samples", "the base model"))
    before = _write(find_model(model.path, model.revision), prompts, model.dtype)
    run.phase(Phase("samples", "the result"))
    after = _write(run.path / "model", prompts, "auto")
    rows = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]
    run.write_json(FILE, {"tokens": TOKENS, "samples": rows})


def _write(folder: Path, prompts: tuple[str, ...], dtype: str) -> list[str]:
    """A model's continuation of each prompt, by greedy decoding."""
    tokenizer = cast(Any, read_tokenizer(folder))
    model = load_full_model(folder, dtype=dtype)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(prompt, tokenizer)], dtype=torch.int64)
        with torch.inference_mode():
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.eos_token_id,
            )
        outputs.append(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return outputs
