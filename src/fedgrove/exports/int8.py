"""Linears in 8 bits (LLM.int8(), Dettmers et al., NeurIPS 2022) with bitsandbytes. Needs the extra ``quantize``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedgrove.exports import Source, refuse_experts, require
from fedgrove.models.files import small_contents
from fedgrove.models.perplexity import nll_of_logits
from fedgrove.models.pretrained import load_full_model
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
    model = load_full_model(folder, device_map="cpu")
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
    from transformers import BitsAndBytesConfig, GenerationConfig

    # The weights that stay unquantized are bfloat16, as is the compute dtype of nf4; LLM.int8() computes in float16.
    model = load_full_model(
        source.model, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    model.generation_config = GenerationConfig()  # transformers refuses to write some that it reads; the model's is copied
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    for name, content in small_contents(source.model).items():
        if not (out / name).exists():
            (out / name).write_bytes(content)
