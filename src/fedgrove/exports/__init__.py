"""Export formats. A new format is a new file here; its file name is its name in ``fedgrove export --to``.

Each file has:

- ``WHAT``: a short description.
- ``EXACT``: True if the reloaded export must have the perplexity of the model; False if it is quantized deliberately.
- ``USE``: how to use it, as Markdown for the model card; ``FOLDER`` in it stands for the folder.
- ``RELATION``, optional: its relation to the base model in the card's metadata, "quantized" or "adapter"; default: "finetune".
- ``LIBRARY``, optional: the library that loads it, for the metadata; default: that of the model's card.
- ``write(source, out)``: writes the export into ``out``, an existing empty folder.
- ``losses(source, folder, windows)``: reloads the export from ``folder`` as a user would, and returns −Σ log p in nats and the
  number of predicted tokens; see :func:`fedgrove.models.perplexity.negative_log_likelihood`.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgrove.errors import FedgroveError

# The remedy where an export reads back otherwise than the model.
NOT_KEPT = "it was not kept. Export --to hf, and report the model to us"


@dataclass(frozen=True)
class Source:
    """The model to export.

    Attributes:
        model: a Hugging Face model directory, or an export in the format ``packed``.
        run: the run folder whose result it is, if any.
    """

    model: Path
    run: Path | None = None


def require(form: str, extra: str, *packages: str) -> None:
    """Checks that the packages that a format needs are installed.

    Raises:
        FedgroveError: a package is missing; says what to install.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise FedgroveError(f'--to {form} needs {", ".join(missing)}: pip install "fedgrove[{extra}]"')


def refuse_experts(form: str, source: Source) -> None:
    """Refuses a mixture of experts, for formats whose tools skip fused experts or fail on them.

    Raises:
        FedgroveError: the model is a mixture of experts.
    """
    from fedgrove.models.experts import TYPES
    from fedgrove.models.stream import Checkpoint

    kind = Checkpoint(source.model).config.model_type
    if kind in TYPES:
        raise FedgroveError(f"--to {form}: the experts of {kind} cannot be written in this format", "use hf or packed")


@contextmanager
def plain_folder(source: Source) -> Iterator[Path]:
    """A temporary folder of links from which transformers loads exactly the tensors that a ``Checkpoint`` of the source reads.

    The source itself may lack its index, have an old one, or hold other weights beside those of the model.
    """
    from fedgrove.models.stream import INDEX, Checkpoint, small_files

    checkpoint = Checkpoint(source.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in small_files(checkpoint.path):
            if not file.name.endswith(".index.json"):
                (folder / file.name).symlink_to(file.resolve())
        only = len(checkpoint.shards) == 1
        for shard in checkpoint.shards:
            (folder / ("model.safetensors" if only else shard)).symlink_to((checkpoint.path / shard).resolve())
        if not only:
            weight_map = {tensor: shard for shard, tensors in checkpoint.shards.items() for tensor in tensors}
            index = {"metadata": {"total_size": checkpoint.num_bytes()}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
        yield folder


@contextmanager
def without_bars() -> Iterator[None]:
    """Libraries show no progress bars of their own: they would be written into ours, and in spite of ``--quiet``.

    transformers' switch for its bars does not reach those of its GGUF reader, and tqdm reads its environment when it is
    imported, which is long before: hence tqdm itself is told.
    """
    from tqdm import tqdm

    original = tqdm.__init__

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    setattr(tqdm, "__init__", disabled)  # noqa: B010 (mypy allows no assignment to a method)
    try:
        yield
    finally:
        setattr(tqdm, "__init__", original)  # noqa: B010
