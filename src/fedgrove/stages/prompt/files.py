"""A prompt as files: what plain peft loads, or a line of text, or embeddings in safetensors; and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgrove.data.tokens import encode
from fedgrove.files import atomic_folder
from fedgrove.job.tables import Job
from fedgrove.models.blocks import Decoder
from fedgrove.models.tensor_files import save_tensors
from fedgrove.report.words import file_name
from fedgrove.stages.prompt.candidates import as_words
from fedgrove.stages.prompt.config import Config
from fedgrove.stages.prompt.scoring import Prompt

CARD = """---
{library}base_model: {base}
---
# {title}

A prompt of {tokens} tokens for `{base}`, which stays as it is; found with "{method}". {use}
"""
PEFT = "`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), FOLDER)` puts it in front of every text."
END = "`fedgrove.api.with_prompt(model, tokenizer, FOLDER, text)` gives the inputs of a text with the prompt after it."
TEXT = "It is the text in `prompt.txt`, to be put {where} a text; `prompt.json` has its token ids."


def write_prompt(folder: Path, config: Config, decoder: Decoder, prompt: Prompt, candidate: Tensor, job: Job) -> dict[str, Any]:
    """Writes a prompt; an existing folder is replaced.

    Args:
        candidate: the candidate that the prompt was made of.

    Returns:
        What is to be known of it: how many tokens it has, and of a written one its text and token ids.
    """
    base = file_name(job.model.name)
    about: dict[str, Any] = {"prompt_tokens": len(prompt.embeddings), "place": config.place}
    with atomic_folder(folder, replace=True) as partial:
        if prompt.written:
            tokenizer = decoder.checkpoint.tokenizer()
            ids = list(as_words(candidate[None])[0])
            text = tokenizer.decode(ids)
            about |= {"text": text, "ids": ids, "exact": encode(text, tokenizer) == ids}
            (partial / "prompt.txt").write_text(text, encoding="utf-8")
            use = TEXT.format(where="after" if config.place == "end" else "before")
        elif config.place == "front":
            _write_peft(partial, prompt.embeddings, base)
            use = PEFT.format(base=base)
        else:
            save_tensors({"prompt": prompt.embeddings.contiguous()}, partial / "prompt.safetensors", {"format": "pt"})
            use = END
        facts = {"base_model": base, "method": config.method, "labels": list(config.labels), "length": config.length, **about}
        (partial / "prompt.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        library = "library_name: peft\n" if (partial / "adapter_config.json").is_file() else ""
        title, tokens = f"{job.name}: prompt", len(prompt.embeddings)
        card = CARD.format(library=library, base=base, title=title, tokens=tokens, method=config.method, use=use)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return about


def _write_peft(folder: Path, embeddings: Tensor, base: str) -> None:
    """The folder of peft's prompt tuning: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    from peft import PromptTuningConfig  # takes a second to import

    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        num_virtual_tokens=len(embeddings),
        token_dim=embeddings.shape[1],
        num_transformer_submodules=1,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors({"prompt_embeddings": embeddings.contiguous()}, folder / "adapter_model.safetensors", {"format": "pt"})
