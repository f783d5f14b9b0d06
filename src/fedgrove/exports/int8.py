"""Linears in 8 bits (LLM.int8(), Dettmers et al., NeurIPS 2022), by bitsandbytes. Needs the extra ``quantize``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedgrove.exports import Source, need, no_experts
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
    """Quantises the linears of the blocks; zeros stay zeros. The model must fit into memory once."""
    quantize("int8", source, out, {"load_in_8bit": True})


def losses(source: Source, folder: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    """By transformers, which calls bitsandbytes."""
    hush()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    return nll_of_logits(lambda ids: model(ids).logits, windows)


def quantize(form: str, source: Source, out: Path, settings: dict[str, object]) -> None:
    """Writes a model that transformers loads quantized.

    Args:
        form: what to call it in a complaint.
        source: the model.
        out: a folder that is there.
        settings: of transformers' ``BitsAndBytesConfig``.

    Raises:
        FedgroveError: bitsandbytes is missing, or the model is a mixture of experts: bitsandbytes leaves those as they are.
    """
    need(form, "quantize", "bitsandbytes")
    no_experts(form, source)
    hush()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # What is not quantized stays bfloat16: the products are computed in it, and int8's in float16 whatever we ask for.
    model = AutoModelForCausalLM.from_pretrained(
        source.model, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    model.save_pretrained(out)
    for file in small_files(source.model):
        if not (out / file.name).exists() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
