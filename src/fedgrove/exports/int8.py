"""Linears in 8 bits (LLM.int8(), Dettmers et al., NeurIPS 2022) with bitsandbytes. Needs the extra ``quantize``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedgrove.exports import Source, plain_folder, refuse_experts, require
from fedgrove.models.perplexity import nll_of_logits
from fedgrove.models.stream import small_files
from fedgrove.stages.tune.frozen import hush

WHAT = "linears in 8 bits (LLM.int8)"
EXACT = False
RELATION = "quantized"
USE = """With `pip install bitsandbytes`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```"""


def write(source: Source, out: Path) -> None:
    """Quantizes the linears of the blocks; zeros stay zero. The model must fit into memory once."""
    quantize("int8", source, out, {"load_in_8bit": True})


def losses(source: Source, folder: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    """Computed by transformers with bitsandbytes."""
    hush()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", trust_remote_code=False).eval()
    return nll_of_logits(lambda ids: model(ids).logits, windows)


def quantize(form: str, source: Source, out: Path, settings: dict[str, object]) -> None:
    """Writes a quantized model for transformers.

    Args:
        form: the name for error messages.
        source: the model.
        out: an existing folder.
        settings: for transformers' ``BitsAndBytesConfig``.

    Raises:
        FedgroveError: bitsandbytes is missing, or the model is a mixture of experts, which bitsandbytes does not quantize.
    """
    require(form, "quantize", "bitsandbytes")
    refuse_experts(form, source)
    hush()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

    # The other weights are bfloat16, the dtype of the products; int8 always computes them in float16.
    quantization = BitsAndBytesConfig(**settings)
    with plain_folder(source) as folder:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu", trust_remote_code=False
        )
    model.generation_config = (
        GenerationConfig()
    )  # the model's is copied below; transformers refuses to write some that it reads
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    for file in small_files(source.model):
        if not (out / file.name).exists() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
