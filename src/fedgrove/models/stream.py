"""Checkpoints on disk, read and written tensor by tensor, so that the full model is never in memory.

Only safetensors files are read: a pickle can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from fedgrove.errors import FedgroveError
from fedgrove.files import atomic_folder
from fedgrove.models.depth import num_blocks, place_of, renumbered, shorter_config
from fedgrove.models.expert_cut import KeptExperts, fewer_experts_config, kept_tensors
from fedgrove.models.experts import slices
from fedgrove.models.files import CONFIG, read_json, weight_files, without_code
from fedgrove.models.plain import write_plain
from fedgrove.models.pretrained import read_config, read_tokenizer
from fedgrove.models.quantized import refuse_quantized
from fedgrove.models.shared import SHARES, read_shares, resolve_shares, shares_of_kept
from fedgrove.models.tensor_files import TORCH_DTYPES, header
from fedgrove.models.width import Width, narrower_config

ROWS = 4096  # of two tensors that are compared at once
Copies = Literal["stored", "once", "each"]


class Checkpoint:
    """A Hugging Face model directory, and overlays: folders with tensors that replace those of the model.

    Which files of the directory are the model is said in :mod:`fedgrove.models.files`.

    Stages never rewrite a model. They write the blocks that they changed into an overlay, one file per block. Reading uses the
    newest overlay that has the tensor; :meth:`write` merges all into one plain directory.

    If the experts of a block are fused into one tensor, each of their matrices can also be read and replaced separately, under
    the name that it has in checkpoints without fused experts (see :func:`fedgrove.models.experts.slices`).

    Args:
        path: a directory with ``config.json`` and safetensors files.
        dtype: read floating-point tensors in this dtype; None: as on disk.
        overlays: folders of safetensors files that replace tensors of the same name, oldest first.
        width: of the blocks, if the overlays made them narrower than in config.json; None: as in config.json.
        kept_blocks: the indexes of the directory's blocks that the model has; None: all. They are numbered anew, and the
            overlays use the new numbers.
        kept_experts: of each block that has experts, the indexes of the directory's experts that the model has; None: all. They
            are numbered anew, and the overlays use the new numbers. Not together with ``kept_blocks``.
        shares: parameters that share a stored tensor, in addition to what the directory itself declares; see
            :mod:`fedgrove.models.shared`. Overlays hold a shared tensor once, under the name of the stored one.

    Attributes:
        shares: parameter -> the name of the tensor that it shares, with the new numbers of the blocks.

    Raises:
        FedgroveError: the directory is no model, has no safetensors files, is quantised, or a file is damaged; or it lacks a
            block that is kept; or ``shares`` cannot be.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype | None = None,
        overlays: Iterable[Path] = (),
        width: Width | None = None,
        kept_blocks: Sequence[int] | None = None,
        kept_experts: KeptExperts | None = None,
        shares: Mapping[str, str] = MappingProxyType({}),
    ):
        assert kept_blocks is None or kept_experts is None, "the experts have the directory's numbers of blocks"
        self.path = Path(path)
        self.dtype = dtype
        self.width = width
        self.kept_blocks = None if kept_blocks is None else tuple(kept_blocks)
        self.kept_experts = kept_experts
        self.overlays = tuple(Path(overlay) for overlay in overlays)
        self._file_of: dict[str, Path] = {}
        self._slices: dict[str, tuple[str, int, slice]] = {}  # of fused experts: tensor, expert, rows
        self._renumbered: dict[Path, dict[str, str]] = {}  # of the directory's files: names of tensors -> their names there
        self._rows: dict[tuple[Path, str], tuple[int, ...]] = {}  # of tensors of these files: the rows that the model has
        self._files = weight_files(self.path)
        headers = {name: header(file) for name, file in self._files.items()}
        dtypes = ((name, entry["dtype"]) for tensors in headers.values() for name, entry in tensors.items())
        refuse_quantized(self.path, self._raw_config(), dtypes)
        self._declared = {**read_shares(self.path), **shares}
        self.shares: dict[str, str] = {}
        self._replaced: dict[str, str] = {}  # shared tensors of blocks that go -> the new names of those in their place
        stored = {name: entry for tensors in headers.values() for name, entry in tensors.items()}
        changes = self._declared or self.kept_blocks is not None or self.kept_experts is not None
        number = num_blocks(read_config(self.path)) if changes else 0
        if self._declared:
            self.shares = resolve_shares(self._declared, stored, number, self.path)
        if self.kept_blocks is not None:
            if max(self.kept_blocks) >= number:
                raise FedgroveError(f"model: it has {number} blocks, so none of index {max(self.kept_blocks)} can stay")
            self.shares, self._replaced = shares_of_kept(self.shares, stored, self.kept_blocks)
            new_names = renumbered(stored, self.kept_blocks)
            moved = {old: new for old, new in self._replaced.items() if new not in new_names}
            self._renumbered = {file: renumbered(header(file), self.kept_blocks, moved) for file in self._files.values()}
        if self.kept_experts is not None:
            for file in self._files.values():
                sources = kept_tensors(header(file), self.kept_experts, number)
                self._renumbered[file] = {name: source.name for name, source in sources.items()}
                self._rows |= {(file, name): source.rows for name, source in sources.items() if source.rows is not None}
        for file in self._files.values():
            self._register(file)
        # file name -> its tensors, in file order; of a tensor that is in several files the last counts
        self.shards = {
            shard: [name for name in self._names_in(file) if self._file_of[name] == file] for shard, file in self._files.items()
        }
        for overlay in self.overlays:
            for file in sorted(overlay.glob("*.safetensors")):
                self._register(file)

    def _register(self, file: Path) -> None:
        """Lets the tensors of a file replace those of earlier files."""
        for name, stored in self._names_in(file).items():
            entry = header(file)[stored]
            if entry["dtype"] not in TORCH_DTYPES:
                raise FedgroveError(
                    f"model: {file}: {name} has dtype {entry['dtype']}, which fedgrove does not read",
                    "convert it to bfloat16 first",
                )
            self._file_of[name] = file
            for part, location in slices(name, self._shape(file, name, stored)).items():
                self._slices[part] = (name, *location)
                self._file_of[part] = file

    def _names_in(self, file: Path) -> dict[str, str]:
        """The model's tensors in a file: their names -> their names in the file."""
        return self._renumbered[file] if file in self._renumbered else {name: name for name in header(file)}

    def _stored(self, name: str) -> str:
        """The name of a tensor in its file."""
        return self._renumbered.get(self._file_of[name], {}).get(name, name)

    def _shape(self, file: Path, name: str, stored: str) -> list[int]:
        """The shape of a tensor as the model has it, given its name there and its name in a file."""
        shape: list[int] = header(file)[stored]["shape"]
        rows = self._rows.get((file, name))
        return shape if rows is None else [len(rows), *shape[1:]]

    def over(
        self,
        *overlays: Path,
        width: Width | None = None,
        kept_blocks: Sequence[int] | None = None,
        kept_experts: KeptExperts | None = None,
    ) -> Checkpoint:
        """The same checkpoint with more overlays on top; overlays that it already has keep their position.

        Args:
            width: of the blocks, if these overlays change it.
            kept_blocks: the indexes of the blocks that stay; only for a checkpoint of all blocks and without overlays.
            kept_experts: see :class:`Checkpoint`; only for a checkpoint of all experts and without overlays.
        """
        is_whole = not (self.overlays or self.kept_blocks or self.kept_experts)
        assert is_whole or (kept_blocks is None and kept_experts is None), "the overlays have the old numbers"
        new = [overlay for overlay in overlays if overlay not in self.overlays]
        return Checkpoint(
            self.path,
            self.dtype,
            (*self.overlays, *new),
            width or self.width,
            kept_blocks or self.kept_blocks,
            kept_experts or self.kept_experts,
            self._declared,
        )

    def as_stored(self) -> Checkpoint:
        """The same checkpoint in the dtypes on disk."""
        return Checkpoint(self.path, None, self.overlays, self.width, self.kept_blocks, self.kept_experts, self._declared)

    def new_name(self, name: str) -> str | None:
        """The name that a tensor of the directory has in this checkpoint, whose blocks may have other numbers.

        None: the tensor is in no block that stays.
        """
        if self.kept_blocks is None or name in self._replaced:
            return self._replaced.get(name, name)
        return next((new for names in self._renumbered.values() for new, old in names.items() if old == name), None)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        smaller = self._smaller_config(self._raw_config())
        return read_config(self.path) if smaller is None else AutoConfig.for_model(**smaller)

    def _smaller_config(self, raw: dict[str, Any]) -> dict[str, Any] | None:
        """The config.json of the model if it has fewer or narrower blocks than ``raw``, or fewer experts; else None."""
        if self.kept_blocks is None and self.width is None and self.kept_experts is None:
            return None
        config = read_config(self.path)
        if self.kept_blocks is not None:
            raw = shorter_config(raw, config, self.kept_blocks)
        if self.kept_experts is not None:
            raw = fewer_experts_config(raw, config, len(next(iter(self.kept_experts.values()))))
        return raw if self.width is None else narrower_config(raw, config, self.width)

    def _raw_config(self) -> dict[str, Any]:
        return read_json(self.path / CONFIG)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the model directory."""
        return read_tokenizer(self.path)

    def names(self) -> list[str]:
        """The names of all tensors in the checkpoint's files; a shared tensor may be there under several names."""
        return [name for names in self.shards.values() for name in names]

    def changed(self) -> list[str]:
        """The names of the tensors that overlays replace, entirely or in part."""
        replaced = {name for name, file in self._file_of.items() if file.parent in self.overlays}
        replaced |= {self._slices[name][0] for name in replaced if name in self._slices}
        return [name for name in self.names() if self.shared_name(name) in replaced]

    def is_changed(self) -> bool:
        """Whether the model is another one than that of the directory."""
        return self.kept_blocks is not None or self.kept_experts is not None or bool(self.changed())

    def __contains__(self, name: str) -> bool:
        return name in self._file_of or name in self.shares

    def shared_name(self, name: str) -> str:
        """The name of the tensor that a parameter shares; its own name if it shares none."""
        return self.shares.get(name, name)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        name = self.shared_name(name)
        with safe_open(self._file_of[name], framework="pt") as file:
            if self._is_slice(name):
                fused, expert, span = self._slices[name]
                kept = self._rows.get((self._file_of[name], fused))
                tensor: Tensor = file.get_slice(self._stored(fused))[expert if kept is None else kept[expert], span]
            elif (kept := self._rows.get((self._file_of[name], name))) is not None:
                stored = file.get_slice(self._stored(name))
                tensor = torch.cat([stored[row : row + 1] for row in kept])
            else:
                tensor = file.get_tensor(self._stored(name))
        for part, (expert, rows) in slices(name, tensor.shape).items():
            if self._file_of[part] != self._file_of[name]:
                tensor[expert, rows] = self.read(part)
        return tensor.to(self._dtype_of(tensor.dtype))

    def spec(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of :meth:`read`, without reading the tensor."""
        name = self.shared_name(name)
        file = self._file_of[name]
        if self._is_slice(name):
            fused, _, rows = self._slices[name]
            entry = header(file)[self._stored(fused)]
            shape = [rows.stop - rows.start, entry["shape"][2]]
        else:
            entry = header(file)[self._stored(name)]
            shape = self._shape(file, name, self._stored(name))
        return torch.Size(shape), self._dtype_of(TORCH_DTYPES[entry["dtype"]])

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[self.shared_name(name)]

    def has_copy(self, name: str) -> bool:
        """Whether a parameter that shares a tensor is also in a file under its own name."""
        return name in self._file_of

    def copy_differs(self, name: str) -> bool:
        """Whether a parameter is in a file under its own name, with other values than the tensor that it shares."""
        return self.has_copy(name) and not self._equal(name, self.shared_name(name))

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors of the checkpoint are equal as :meth:`read`; the result is kept until a file changes."""
        shape = self.spec(one)[0]
        if shape != self.spec(other)[0] or not shape:
            return False
        return self._equal(self.shared_name(one), self.shared_name(other))

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors in files, of one shape, have the same values."""
        files = self._file_of[one], self._file_of[other]
        return _same(
            *files, self._stored(one), self._stored(other), self.dtype, tuple(file.stat().st_mtime_ns for file in files)
        )

    def _is_slice(self, name: str) -> bool:
        """Whether a tensor is a slice of another tensor of its file."""
        return name in self._slices and self._stored(name) not in header(self._file_of[name])

    def num_bytes(self) -> int:
        """Bytes of all tensors as :meth:`write` would write them."""
        total = 0
        for name in self.names():
            shape, dtype = self.spec(name)
            total += shape.numel() * dtype.itemsize
        return total

    def fingerprint(self) -> str:
        """A hash of names, shapes, dtypes, file sizes and configuration, to distinguish checkpoints without reading weights."""
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        for name, file in self._files.items():
            digest.update(json.dumps([name, file.stat().st_size, header(file)]).encode())
        if self.shares:
            digest.update(json.dumps(self.shares, sort_keys=True).encode())
        return digest.hexdigest()

    def facts(self) -> tuple[object, ...]:
        """What changes if files of the model change, without its overlays: sizes and times; its dtype and shapes too."""
        files = [self.path / CONFIG, *self._files.values()]
        times = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        experts = None if self.kept_experts is None else tuple(sorted(self.kept_experts.items()))
        shares = tuple(sorted(self.shares.items()))
        return self.path, self.dtype, repr(self.width), self.kept_blocks, experts, shares, times

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

    def write_into(self, folder: Path, texts: Mapping[str, str] | None = None, copies: Copies = "stored") -> None:
        """Like :meth:`write`, but into an existing folder and not atomically.

        Args:
            copies: of shared tensors: "stored", those that the files have; "once"; or "each", one for every parameter, which
                is what other programs load.
        """
        shards = {
            shard: {name: self.spec(name) for name in self._copied(names, copies)} for shard, names in self.shards.items()
        }
        shares = {SHARES: json.dumps(self.shares, indent=2) + "\n"} if self.shares else {}
        write_plain(folder, self.path, shards, self.read, self.plain_config(), {**shares, **(texts or {})})

    def plain_config(self) -> dict[str, Any]:
        """The config.json of the model as :meth:`write` writes it."""
        config = without_code(self._raw_config())
        config = self._smaller_config(config) or config
        if self.dtype is not None:
            config = {key: value for key, value in config.items() if key != "torch_dtype"}
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        return config

    def _copied(self, names: list[str], copies: Copies) -> list[str]:
        """The names of a file's tensors with that many copies of the shared ones."""
        if copies == "once":
            return [name for name in names if name not in self.shares]
        missing = [name for name, stored in self.shares.items() if stored in names and not self.has_copy(name)]
        return [*names, *sorted(missing, key=place_of)] if copies == "each" else names

    def _dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype


@lru_cache(maxsize=64)
def _same(
    file: Path, other_file: Path, name: str, other: str, dtype: torch.dtype | None, modified: tuple[int, ...]
) -> bool:  # `modified`, in nanoseconds, is part of the cache's key
    with safe_open(file, framework="pt") as one, safe_open(other_file, framework="pt") as two:
        parts = one.get_slice(name), two.get_slice(other)
        for start in range(0, parts[0].get_shape()[0], ROWS):
            a, b = (part[start : start + ROWS] for part in parts)
            common = dtype or torch.promote_types(a.dtype, b.dtype)
            if not torch.equal(a.to(common), b.to(common)):
                return False
    return True
