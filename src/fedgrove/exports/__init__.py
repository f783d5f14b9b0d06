"""Forms in which a result can be given away. A form's file name is its name in ``fedgrove export --to``.

Each file has:

- ``WHAT``: the form in a few words.
- ``EXACT``: True if what is reloaded must have the perplexity of the model; False if it is quantized on purpose.
- ``USE``: how it is used, Markdown for its model card; ``FOLDER`` there stands for the folder.
- ``RELATION``, optional: what it is to the base model in its card's metadata, "quantized" or "adapter"; default: "finetune".
- ``LIBRARY``, optional: the library that loads it, for the metadata; default: that of the model's card.
- ``write(source, out)``: writes the form into ``out``, a folder that is there and empty.
- ``losses(source, folder, windows)``: reloads what lies in ``folder``, as its user would, and gives −Σ log p in nats and the
  number of tokens predicted: see :func:`fedgrove.models.perplexity.negative_log_likelihood`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fedgrove.errors import FedgroveError


@dataclass(frozen=True)
class Source:
    """What is given away.

    Attributes:
        model: a Hugging Face model directory, or what the form ``packed`` wrote.
        run: the run folder that it is the result of, if it is one.
    """

    model: Path
    run: Path | None = None


def need(form: str, extra: str, *packages: str) -> None:
    """Checks that the packages of a form are there.

    Raises:
        FedgroveError: says what to install.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise FedgroveError(f'--to {form} needs {", ".join(missing)}: pip install "fedgrove[{extra}]"')


def no_experts(form: str, source: Source) -> None:
    """Refuses a mixture of experts, for forms whose tools pass fused experts by or break on them.

    Raises:
        FedgroveError: it is one.
    """
    from fedgrove.models.experts import TYPES
    from fedgrove.models.stream import Checkpoint

    kind = Checkpoint(source.model).config.model_type
    if kind in TYPES:
        raise FedgroveError(f"--to {form}: the experts of {kind} cannot be written in this form", "use hf or packed")
