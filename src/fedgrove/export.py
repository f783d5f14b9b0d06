"""Exports a model to one of the formats of :mod:`fedgrove.exports`, and measures the export."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from fedgrove import plugins
from fedgrove.data.sources import is_hub
from fedgrove.data.windows import evaluation_windows
from fedgrove.errors import FedgroveError
from fedgrove.events import Listener, Phase
from fedgrove.exports import NOT_KEPT, Source
from fedgrove.exports.packed import is_packed
from fedgrove.files import atomic_folder, write_atomically
from fedgrove.models.blocks import Decoder
from fedgrove.models.files import find_model
from fedgrove.models.perplexity import perplexity, perplexity_of
from fedgrove.models.stream import Checkpoint
from fedgrove.report.model_card import card_of_form
from fedgrove.report.reader import read_perplexities
from fedgrove.runfolder import unfinished

NEAR = 0.01  # largest relative difference between the perplexities of an exact format and of the model (other rounding)


@dataclass(frozen=True)
class Texts:
    """The texts on which an export is measured.

    Attributes:
        files: (name, file, template) of each text.
        length: tokens of a window.
        windows: the maximum number of windows of each text; None: all.
        known: (name, perplexity of the model) of texts that a run measured in the same way.
    """

    files: tuple[tuple[str, Path, str | None], ...] = ()
    length: int = 512
    windows: int | None = None
    known: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Measured:
    """An export as it is recorded in ``OUT.export.json``.

    Attributes:
        form: the name of the format.
        bytes: the size of all files of the export.
        of_model: the size of all files of the model.
        perplexity: by text, of the reloaded export.
        of_perplexity: by text, of the model.
        length: tokens of a window.
    """

    form: str
    bytes: int
    of_model: int
    perplexity: dict[str, float]
    of_perplexity: dict[str, float]
    length: int


def export(
    source: Path, to: str, out: Path | None = None, texts: Texts | None = None, listener: Listener | None = None
) -> Path:
    """Writes the model of a run, of a model directory or of a packed model in another format.

    The measurements are written to ``OUT.export.json``, next to the folder.

    Args:
        source: a run folder, a Hugging Face model directory, or an export in the format ``packed``.
        to: the name of the format.
        out: a folder that does not exist yet; default: a folder in ``source``, named after the format.
        texts: the texts to measure on; default: the run's held-out texts, with the run's windows.
        listener: receives the events of the export.

    Returns:
        The folder.

    Raises:
        FedgroveError: the source is none of these, ``out`` exists, or an exact format has another perplexity than the
            model (the export is removed then).
    """
    forms = plugins.names("exports")
    if to not in forms:
        raise FedgroveError(f"--to {to}: there is no such format", f"choose one of {', '.join(forms)}")
    form = plugins.load("exports", to)
    out = out or source / getattr(form, "FOLDER", to)
    if out.exists():
        raise FedgroveError(f"{out} exists already", "choose another folder or remove it")
    given = find_source(source)
    if is_packed(given.model) and to not in ("hf", "packed"):
        raise FedgroveError(f"--to {to}: {given.model} is packed", "unpack it with --to hf, and export what that gives")
    listener = listener or Listener()
    texts = held_out(given) if texts is None else texts
    # Texts are read before anything is written, so that a fault in them is not found after an hour; of a packed model the
    # tokenizer is packed as well.
    windows = None if is_packed(given.model) else _windows(given.model, texts)
    with atomic_folder(out) as partial:
        listener.on_event(Phase("export", f"writing {to}"))
        form.write(given, partial)
        if to != "hf":
            relation, library = getattr(form, "RELATION", "finetune"), getattr(form, "LIBRARY", None)
            text = card_of_form(given.model, to, form.USE, out.name, relation, library)
            (partial / "README.md").write_text(text, encoding="utf-8")
        measured = _measure(form, to, given, partial, windows or _windows(partial, texts), texts, listener)
    write_atomically(out.with_name(f"{out.name}.export.json"), json.dumps(asdict(measured), indent=2) + "\n")
    return out


def find_source(path: Path) -> Source:
    """The model to export: of a run folder, or the path itself.

    Raises:
        FedgroveError: the run has not ended.
    """
    if not (path / "job.toml").is_file():
        return Source(path)
    if not (path / "model").is_dir():
        raise unfinished(path)
    return Source(path / "model", path)


def find_named(model: str | Path) -> Path:
    """The directory of a model that a user names: a run folder, a model directory or a hub id.

    Raises:
        FedgroveError: the run has not ended, or there is no such model.
    """
    return find_model(str(find_source(Path(model)).model if Path(model).is_dir() else model))


def held_out(source: Source) -> Texts:
    """The held-out texts of a run that still exist, and the perplexity that the run measured on them.

    Texts for accuracy or generation are left out: they have a prompt and an answer instead of a text.
    """
    if source.run is None:
        return Texts()
    job = tomllib.loads((source.run / "job.toml").read_text(encoding="utf-8"))
    wanted: dict[str, Any] = job.get("evaluate", {})
    texts = [text for text in wanted.get("data", []) if text.get("measure", "perplexity") == "perplexity"]
    files = [(text["name"], Path(text["path"]), text.get("text")) for text in texts]
    last = len(job["stages"]) - 1
    known = read_perplexities(source.run).get((last, None), {})
    there = tuple(text for text in files if is_hub(text[1]) or text[1].exists())
    return Texts(there, wanted.get("length", 512), wanted.get("windows"), tuple(known.items()))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _measure(
    form: ModuleType,
    to: str,
    source: Source,
    folder: Path,
    windows: Mapping[str, list[Tensor]],
    texts: Texts,
    listener: Listener,
) -> Measured:
    of_model = dict(texts.known)
    found: dict[str, float] = {}
    for name, windows_of_text in windows.items():
        if name not in of_model and not is_packed(source.model):
            listener.on_event(Phase("export", "measuring the model", text=name))
            of_model[name] = perplexity(Decoder(Checkpoint(source.model)), windows_of_text)
        listener.on_event(Phase("export", f"measuring {to}", text=name))
        total, count = form.losses(source, folder, windows_of_text)
        found[name] = perplexity_of(total, count)
        if form.EXACT and name in of_model and not math.isclose(found[name], of_model[name], rel_tol=NEAR):
            raise FedgroveError(
                f"--to {to}: on {name} the export has perplexity {found[name]:.3f}, but the model has {of_model[name]:.3f}",
                NOT_KEPT,
            )
    of = {name: of_model[name] for name in found if name in of_model}
    return Measured(to, folder_bytes(folder), folder_bytes(source.model), found, of, texts.length)


def _windows(model: Path, texts: Texts) -> dict[str, list[Tensor]]:
    """The windows of each text by its name, cut by the tokenizer of a model directory."""
    if not texts.files:
        return {}
    tokenizer = Checkpoint(model).tokenizer()
    return {
        name: evaluation_windows(file, template, tokenizer, texts.length, texts.windows) for name, file, template in texts.files
    }
