"""A model directory in which a tensor that several blocks share is stored once, and ``shares.json`` says who shares it.

fedgrove reads it like any other; other programs do not: they would start the missing tensors at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.exports import Source
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import negative_log_likelihood
from fedgrove.models.stream import Checkpoint

WHAT = "shared tensors stored once, for fedgrove"
EXACT = True
USE = """Other programs do not know of shared tensors. Write one for every block, then load it like any other model:

```sh
fedgrove export FOLDER --to hf --out plain
```"""


def write(source: Source, out: Path) -> None:
    """Writes the model.

    Raises:
        FedgroveError: its blocks share nothing.
    """
    checkpoint = Checkpoint(source.model)
    if not checkpoint.shares:
        raise FedgroveError("--to shared: the blocks of this model share no tensors", "use hf")
    checkpoint.write_into(out, copies="once")


def losses(source: Source, folder: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    """Computed block by block, so the model need not fit into memory."""
    return negative_log_likelihood(Decoder(Checkpoint(folder)), windows)
