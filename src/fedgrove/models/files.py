"""Which files of a folder are the model: one rule for reading, hashing, copying and writing.

The weights are the files that transformers would read, in its order: the file that ``transformers_weights`` in config.json
names; else ``model.safetensors``; else the files that ``model.safetensors.index.json`` names; else shards that are named
``model-XXXXX-of-YYYYY.safetensors``, if all are there (transformers does not load these; the result gets an index). Any other
weights in the folder (adapters, older copies, variants, other formats) are left alone and are not part of a result.

Code is never part of a model: of all other files only those are copied that a list here allows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from fedgrove.errors import FedgroveError, first_line

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PACKED = "packed.json"  # what `export --to packed` writes
_EXPLICIT = "transformers_weights"  # the key of config.json that names the weights
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_COPIED = (".json", ".jinja", ".model", ".txt", ".md", ".tiktoken", ".spm", ".vocab", ".bpe")
_COPIED_NAMES = re.compile(r"(license|licence|notice|copying)[^.]*(\.\d+)*", re.IGNORECASE)
_NOT_COPIED = re.compile(
    r".*\.index\.json|adapter_config\.json|(trainer|training|optimizer|scheduler)_.*|quantize_config\.json"
)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FedgroveError: the file is missing, or is no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FedgroveError(f"model: {file} is not understood: {first_line(error)}", "copy it again") from error
    if not isinstance(value, dict):
        raise FedgroveError(f"model: {file} is not understood: it holds no JSON object", "copy it again")
    return value


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors files that are the model, sorted by name: the name in a result -> the file.

    Raises:
        FedgroveError: there are none, one is missing, or the index is damaged or names a file outside of the folder.
    """
    if not (folder / CONFIG).is_file():
        raise _no_model(folder, f"has no {CONFIG}", "give a Hugging Face model directory")
    explicit = read_json(folder / CONFIG).get(_EXPLICIT)
    if explicit is not None:
        where = f"{folder / CONFIG}: {_EXPLICIT}"
        name = _inside(explicit, where)
        if name.endswith(".index.json"):
            return _indexed(folder, name)
        return _existing(folder, [name], where)
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: folder / WEIGHTS}
    if (folder / INDEX).is_file():
        return _indexed(folder, INDEX)
    shards = sorted(file.name for file in folder.iterdir() if _SHARD.fullmatch(file.name))
    if not shards:
        raise _no_model(folder, "has no .safetensors file that is the model", "copy the model again; its copy is incomplete")
    numbers = {name.rpartition("-of-")[2] for name in shards}
    if len(numbers) > 1:
        raise FedgroveError(
            f"model: {folder} has shards of several models ({shards[0]}, {shards[-1]}) and no {INDEX}", "remove all but one"
        )
    total = int(numbers.pop().partition(".")[0])
    return _existing(folder, [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)], shards[0])


def loads_as_it_is(folder: Path) -> bool:
    """Whether transformers reads from a folder what :func:`weight_files` names, and nothing besides.

    It needs an index with metadata for several files, puts an adapter that lies in the folder on top of the model, and
    may run code that config.json names.
    """
    weight_files(folder)
    config = read_json(folder / CONFIG)
    if without_code(config) != {key: value for key, value in config.items() if key != _EXPLICIT}:
        return False
    index = config.get(_EXPLICIT) or (WEIGHTS if (folder / WEIGHTS).is_file() else INDEX)
    if index.endswith(".index.json") and not ((folder / index).is_file() and "metadata" in read_json(folder / index)):
        return False
    return not (folder / _ADAPTER[0]).is_file()


def index_of(tensors: Mapping[str, list[str]], num_bytes: int) -> str | None:
    """The text of a result's index; None for a single file, which needs none.

    Args:
        tensors: file name -> names of its tensors.
        num_bytes: of all tensors.
    """
    if len(tensors) == 1:
        return None
    places = {name: file for file, names in tensors.items() for name in names}
    return json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def small_contents(folder: Path) -> dict[str, bytes]:
    """The files of a model that are neither weights nor index, by name: configuration, tokenizer, templates, texts.

    Configurations come without references to code.

    Raises:
        FedgroveError: a file is a link to a file outside of the folder.
    """
    contents = {}
    for file in small_files(folder):
        if not _lies_in(folder, file):
            raise FedgroveError(f"model: {file} is a link to a file outside of the folder", "copy the file there")
        contents[file.name] = file.read_bytes()
        if file.name in (CONFIG, "tokenizer_config.json"):
            raw = read_json(file)
            if without_code(raw) != raw:
                contents[file.name] = (json.dumps(without_code(raw), indent=2) + "\n").encode()
    return contents


def small_files(folder: Path) -> list[Path]:
    """The files of a model that are neither weights nor index, sorted by name."""
    return sorted(file for file in folder.iterdir() if _is_copied(file.name) and file.is_file())


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration (of a model or a tokenizer) without references to code or to other weight files, at any depth.

    The implementation of attention or of experts is left out, too: it may name a kernel of the hub, whose native code
    transformers would download and run.
    """
    return {
        key: without_code(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("auto_map", "custom_pipelines", _EXPLICIT) and not _IMPLEMENTATION.fullmatch(key)
    }


def find_model(path: str, revision: str | None = None) -> Path:
    """A local directory, or the local copy of a model of the Hugging Face hub, which is downloaded if necessary.

    Raises:
        FedgroveError: there is no such directory or model, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "README.md"]
    unwanted = ["consolidated*", "original/*", "onnx/*"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HFValidationError, OSError) as error:
        raise FedgroveError(
            f"model.path: {path} is neither a directory here nor an accessible model on the hub ({type(error).__name__})",
            "name a folder with config.json and .safetensors files, or a model of the hub that this machine can reach",
        ) from error


def _indexed(folder: Path, index: str) -> dict[str, Path]:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FedgroveError(f"model: {folder / index} is damaged (no weight_map)", "copy it again")
    below = PurePosixPath(index).parent
    names = sorted({str(below / _inside(name, str(folder / index))) for name in places.values()})
    return _existing(folder, names, index)


def _inside(name: object, where: str) -> str:
    """The name of a safetensors file or index in the folder."""
    if not isinstance(name, str) or not name:
        raise FedgroveError(f"model: {where} is damaged ({name!r} is no file name)", "copy it again")
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).is_absolute() or {".."} & {*path.parts, *PureWindowsPath(name).parts}:
        raise FedgroveError(f"model: {where} names {name}, a file outside of the folder", "copy the model again")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise FedgroveError(
            f"model: {where} names {name}, which is no .safetensors file",
            "convert it with transformers: model.save_pretrained(DIR) (pickled weights are not read: they can run code)",
        )
    return name


def _existing(folder: Path, names: list[str], index: str) -> dict[str, Path]:
    for name in names:
        if not (folder / name).is_file():
            raise FedgroveError(f"model: {folder} lacks {name}, which {index} names", "copy it there")
    results = [name.replace("/", "-") for name in names]
    if len(names) == 1:
        results = [WEIGHTS]
    elif WEIGHTS in results:  # transformers would read this file only
        results = [f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]
    return {result: folder / name for result, name in zip(results, names, strict=True)}


def _lies_in(folder: Path, file: Path) -> bool:
    """Whether a file, with links followed, lies in a model's folder, or in the hub's cache of the same model."""
    place = folder.resolve()
    places = [place] + ([place.parent.parent / "blobs"] if place.parent.name == "snapshots" else [])
    return any(file.resolve().is_relative_to(one) for one in places)


def _is_copied(name: str) -> bool:
    if name.startswith(".") or _NOT_COPIED.fullmatch(name):
        return False
    return name.lower().endswith(_COPIED) or _COPIED_NAMES.fullmatch(name) is not None


def _no_model(folder: Path, what: str, remedy: str) -> FedgroveError:
    """Says what a folder without weights that can be read holds instead."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    if set(names) & set(_ADAPTER):
        base = "its base model"
        if _ADAPTER[0] in names:
            base = str(read_json(folder / _ADAPTER[0]).get("base_model_name_or_path") or base)
        return FedgroveError(
            f"model: {folder} holds a PEFT adapter, not a model",
            f"merge it into {base} with peft (merge_and_unload, save_pretrained), and give the merged model's directory",
        )
    if PACKED in names:
        return FedgroveError(f"model: {folder} holds a packed model", f"unpack it: fedgrove export {folder} --to hf --out DIR")
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return FedgroveError(
            f"model: {folder} holds {gguf[0]}, which is an export and cannot be pruned or tuned",
            "give the Hugging Face model directory that it was made of",
        )
    if (folder / CONFIG).is_file():
        if any(name.lower().endswith(_PICKLES) for name in names):
            return FedgroveError(
                f"model: {folder} has no .safetensors file",
                "convert it with transformers: model.save_pretrained(DIR) (pickled weights are not read: they can run code)",
            )
        if others := [name for name in names if name.endswith(".safetensors")]:
            return FedgroveError(
                f"model: {folder} has {others[0]}, but neither {WEIGHTS} nor {INDEX}, which transformers reads",
                f"if it is the full model, rename it to {WEIGHTS}; if not, copy the model again",
            )
    return FedgroveError(f"model: {folder} {what}", remedy)
