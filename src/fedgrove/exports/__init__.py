"""Export formats. A new format is a new file here; its file name is its name in ``fedgrove export --to``.

Each file has:

- ``WHAT``: a short description.
- ``EXACT``: True if the reloaded export must have the perplexity of the model (within 1 %); False for a quantized
  format.
- ``USE``: how to use it, as Markdown for the model card; ``FOLDER`` in it stands for the folder.
- ``RELATION``, optional: its relation to the base model in the card's metadata, "quantized" or "adapter"; default: "finetune".
- ``LIBRARY``, optional: the library that loads it, for the metadata; default: that of the model's card.
- ``write(source, out)``: writes the export into ``out``, an existing empty folder.
- ``losses(source, folder, windows)``: reloads the export from ``folder`` as a user would, and returns −Σ log p in nats and the
  number of predicted tokens; see :func:`fedgrove.models.perplexity.negative_log_likelihood`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fedgrove.errors import FedgroveError

# The remedy where an export reads back otherwise than the model.
NOT_KEPT = "the export was removed. Use --to hf, and report the model to us"


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
