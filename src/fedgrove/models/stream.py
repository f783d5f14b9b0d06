"""Checkpoints on disk, read and written tensor by tensor, so that the full model is never in memory.

Only safetensors files are read: a pickle can run code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.files import atomic_file, atomic_folder
from fedgrove.models.experts import slices
from fedgrove.models.width import Width, narrower_config

SAFETENSORS_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


class Checkpoint:
    """A Hugging Face model directory, and overlays: folders with tensors that replace those of the model.

    Stages never rewrite a model. They write the blocks that they changed into an overlay, one file per block. Reading uses the
    newest overlay that has the tensor; :meth:`write` merges all into one plain directory.

    If the experts of a block are fused into one tensor, each of their matrices can also be read and replaced separately, under
    the name that it has in checkpoints without fused experts (see :func:`fedgrove.models.experts.slices`).

    Args:
        path: a directory with ``config.json`` and safetensors files.
        dtype: read floating-point tensors in this dtype; None: as on disk.
        overlays: folders of safetensors files that replace tensors of the same name, oldest first.
        width: of the blocks, if the overlays made them narrower than in config.json; None: as in config.json.

    Raises:
        FedgroveError: the directory is no model, has no safetensors files, or a file is damaged.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None, overlays: Iterable[Path] = (), width: Width | None = None):
        self.path = Path(path)
        self.dtype = dtype
        self.width = width
        self.overlays = tuple(Path(overlay) for overlay in overlays)
        if not (self.path / "config.json").is_file():
            raise FedgroveError(f"model: {self.path} has no config.json", "give a Hugging Face model directory")
        self.shards: dict[str, list[str]] = {}  # file name -> its tensors, in file order
        self._file_of: dict[str, Path] = {}
        self._slices: dict[str, tuple[str, int, slice]] = {}  # of fused experts: tensor, expert, rows
        for file in self._weight_files():
            self.shards[file.name] = self._register(file)
        for overlay in self.overlays:
            for file in sorted(overlay.glob("*.safetensors")):
                self._register(file)

    def _register(self, file: Path) -> list[str]:
        """Lets the tensors of a file replace those of earlier files; returns their names in file order."""
        header = _header(file)
        for name, entry in header.items():
            self._file_of[name] = file
            for part, location in slices(name, entry["shape"]).items():
                self._slices[part] = (name, *location)
                self._file_of[part] = file
        return list(header)

    def over(self, *overlays: Path, width: Width | None = None) -> Checkpoint:
        """The same checkpoint with more overlays on top; overlays that it already has keep their position.

        Args:
            width: of the blocks, if these overlays change it.
        """
        new = [overlay for overlay in overlays if overlay not in self.overlays]
        return Checkpoint(self.path, self.dtype, (*self.overlays, *new), width or self.width)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.path)
        except (ValueError, OSError, KeyError) as error:
            raise FedgroveError(f"model: {self.path / 'config.json'} is not understood: {_first_line(error)}") from error
        if self.width is not None:
            config = AutoConfig.for_model(**narrower_config(self._raw_config(), config, self.width))
        return config

    def _raw_config(self) -> dict[str, Any]:
        raw: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return raw

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the model directory."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (ValueError, OSError, KeyError) as error:
            raise FedgroveError(f"model: {self.path} has no tokenizer that loads: {_first_line(error)}") from error

    def names(self) -> list[str]:
        """The names of all tensors of the checkpoint."""
        return [name for names in self.shards.values() for name in names]

    def changed(self) -> list[str]:
        """The names of the tensors that overlays replace, entirely or in part."""
        replaced = {name for name, file in self._file_of.items() if file.parent in self.overlays}
        replaced |= {self._slices[name][0] for name in replaced if name in self._slices}
        return [name for name in self.names() if name in replaced]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with safe_open(self._file_of[name], framework="pt") as file:
            if self._is_slice(name):
                fused, expert, rows = self._slices[name]
                tensor: Tensor = file.get_slice(fused)[expert, rows]
            else:
                tensor = file.get_tensor(name)
        for part, (expert, rows) in slices(name, tensor.shape).items():
            if self._file_of[part] != self._file_of[name]:
                tensor[expert, rows] = self.read(part)
        return tensor.to(self._dtype_of(tensor.dtype))

    def spec(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of :meth:`read`, without reading the tensor."""
        header = _header(self._file_of[name])
        if self._is_slice(name):
            fused, _, rows = self._slices[name]
            entry = header[fused] | {"shape": [rows.stop - rows.start, header[fused]["shape"][2]]}
        else:
            entry = header[name]
        return torch.Size(entry["shape"]), self._dtype_of(_TORCH_DTYPES[entry["dtype"]])

    def _is_slice(self, name: str) -> bool:
        """Whether a tensor is a slice of another tensor of its file."""
        return name in self._slices and name not in _header(self._file_of[name])

    def num_bytes(self) -> int:
        """Bytes of all tensors as :meth:`write` would write them."""
        total = 0
        for name in self.names():
            shape, dtype = self.spec(name)
            total += shape.numel() * dtype.itemsize
        return total

    def fingerprint(self) -> str:
        """A hash of names, shapes, dtypes, file sizes and configuration, to distinguish checkpoints without reading weights."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in self._weight_files():
            digest.update(json.dumps([file.name, file.stat().st_size, _header(file)]).encode())
        return digest.hexdigest()

    def write(self, out: Path, texts: Mapping[str, str] | None = None) -> None:
        """Writes one plain model directory atomically: the same shards and order of tensors, configuration, tokenizer.

        Memory: one tensor.

        Args:
            out: the folder.
            texts: text files to add or to replace, name -> content.

        Raises:
            FedgroveError: ``out`` already exists.
        """
        if out.exists():
            raise FedgroveError(f"{out} exists already", "choose another folder or remove it")
        with atomic_folder(out) as partial:
            self.write_into(partial, texts)

    def write_into(self, folder: Path, texts: Mapping[str, str] | None = None) -> None:
        """Like :meth:`write`, but into an existing folder and not atomically."""
        for file in small_files(self.path):
            shutil.copyfile(file, folder / file.name)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        for shard, names in self.shards.items():
            specs = {name: self.spec(name) for name in names}
            write_safetensors(folder / shard, specs, (self.read(name) for name in names))
        if (self.path / INDEX).is_file():
            index = json.loads((self.path / INDEX).read_text())
            index.setdefault("metadata", {})["total_size"] = self.num_bytes()
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        config = self._raw_config()
        if self.width is not None:
            config = narrower_config(config, AutoConfig.from_pretrained(self.path), self.width)
        if self.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.width is not None or self.dtype is not None:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _weight_files(self) -> list[Path]:
        if (self.path / INDEX).is_file():
            try:
                index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
                files = [self.path / name for name in sorted(set(index["weight_map"].values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FedgroveError(f"model: {self.path / INDEX} is damaged ({_first_line(error)})", "copy it again") from error
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise FedgroveError(f"model: {self.path} lacks {missing[0]}, which {INDEX} names", "copy it there")
            return files
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise FedgroveError(
                f"model: {self.path} has no .safetensors file",
                "convert it with transformers: model.save_pretrained(DIR) (pickled weights are not read: they can run code)",
            )
        return files

    def _dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically; ``tensors`` are in memory."""
    aligned = sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    )  # the order of the safetensors library
    specs = {name: (tensor.shape, tensor.dtype) for name, tensor in aligned}
    with atomic_file(path) as partial:
        write_safetensors(partial, specs, (tensor for _, tensor in aligned), metadata)


def write_safetensors(
    path: Path,
    specs: Mapping[str, tuple[torch.Size, torch.dtype]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file of any size with one tensor in memory at a time.

    Args:
        path: the file.
        specs: name, shape and dtype of every tensor, in file order.
        tensors: the tensors, in that order.
        metadata: strings for the header.

    Raises:
        OSError: for example, the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (shape, dtype) in specs.items():
        size = shape.numel() * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned to eight bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors:
            if tensor.numel():
                file.write(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def small_files(folder: Path) -> list[Path]:
    """The files of a model directory that are not weights: configuration, index, tokenizer, model card, license."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.endswith(_WEIGHTS)]


def find_model(path: str, revision: str | None = None) -> Path:
    """A local directory, or the local copy of a model of the Hugging Face hub, which is downloaded if necessary.

    Raises:
        FedgroveError: there is no such directory or model, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HFValidationError, OSError) as error:
        raise FedgroveError(
            f"model.path: {path} is neither a directory here nor an accessible model on the hub ({type(error).__name__})"
        ) from error


def _header(file: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of a safetensors file, in file order."""
    return _headers(file, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=4096)
def _headers(file: Path, modified: int) -> dict[str, Any]:  # `modified`, in nanoseconds, is part of the cache's key
    try:
        with safe_open(file, framework="pt") as reader:
            tensors = ((name, reader.get_slice(name)) for name in reader.offset_keys())
            header = {name: {"dtype": part.get_dtype(), "shape": part.get_shape()} for name, part in tensors}
    except (SafetensorError, OSError) as error:
        raise FedgroveError(f"model: {file} is damaged ({_first_line(error)})", "copy it again") from error
    for name, entry in header.items():
        if entry["dtype"] not in _TORCH_DTYPES:
            raise FedgroveError(
                f"model: {file}: {name} has dtype {entry['dtype']}, which fedgrove does not read",
                "convert it to bfloat16 first",
            )
    return header


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
