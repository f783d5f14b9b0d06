"""A plain Hugging Face directory; for a packed model, the original files bit for bit.

Tensors that several blocks share are written once for each of them, because no configuration of transformers says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fedgrove.exports import Source
from fedgrove.exports.packed import is_packed, unpack
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import negative_log_likelihood
from fedgrove.models.stream import Checkpoint

WHAT = "plain Hugging Face directory"
EXACT = True
USE = """```python
from transformers import pipeline

write = pipeline("text-generation", "FOLDER")
print(write("The", max_new_tokens=40)[0]["generated_text"])
```"""


def write(source: Source, out: Path) -> None:
    """Copies the model, or unpacks it."""
    if is_packed(source.model):
        unpack(source.model, out)
    else:
        Checkpoint(source.model).write_into(out, copies="each")


def losses(source: Source, folder: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    """Computed block by block, so the model need not fit into memory."""
    return negative_log_likelihood(Decoder(Checkpoint(folder)), windows)
