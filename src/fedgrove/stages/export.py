"""Give a model away: as a plain Hugging Face directory, or packed to a fraction of its bytes."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.job import Job, NarrowStage, PruneStage, TuneStage
from fedgrove.models.stream import Checkpoint, raw_bytes, small_files, write_safetensors
from fedgrove.rounds import wire
from fedgrove.run import unfinished

PACKED = "packed.json"
FILES = "files.packed"
PART = 2**28  # bytes of tensors in one packed file: what packing and unpacking hold in memory


def export(source: Path, to: str, out: Path) -> Path:
    """Writes the model of a run, of a model directory or of a packed model in another form.

    Args:
        source: a run folder, a Hugging Face model directory, or what ``to="packed"`` wrote.
        to: "hf" or "packed".
        out: a folder that does not exist yet.

    Raises:
        FedgroveError: the source is none of these, or ``out`` exists.
    """
    if out.exists():
        raise FedgroveError(f"{out} exists already; choose another folder or remove it")
    source = find_result(source)
    if to == "packed":
        return pack_model(source, out)
    if (source / PACKED).is_file():
        return unpack_model(source, out)
    Checkpoint(source).write(out)
    return out


def find_result(path: Path) -> Path:
    """The model directory of a run folder, or the path itself.

    Raises:
        FedgroveError: the run has not ended.
    """
    if not (path / "job.toml").is_file():
        return path
    if not (path / "model").is_dir():
        raise FedgroveError(unfinished(path))
    return path / "model"


def pack_model(source: Path, out: Path) -> Path:
    """Packs a model directory: zeros cost one bit, the bytes of values that compress are compressed; nothing is lost."""
    if (source / PACKED).is_file():
        raise FedgroveError(f"{source} is packed already")
    checkpoint = Checkpoint(source)
    beside = _beside(out)
    parts: list[list[str]] = [[]]
    room = PART
    for name in checkpoint.names():
        shape, dtype = checkpoint.spec(name)
        size = shape.numel() * dtype.itemsize
        if parts[-1] and size > room:
            parts.append([])
            room = PART
        parts[-1].append(name)
        room -= size
    for number, names in enumerate(parts):
        wire_bytes = wire.pack({name: checkpoint.read(name) for name in names}, {})
        (beside / _part(number)).write_bytes(wire_bytes)
    files = {file.name: torch.from_numpy(np.fromfile(file, np.uint8)) for file in small_files(source)}
    (beside / FILES).write_bytes(wire.pack(files, {}))
    (beside / PACKED).write_text(json.dumps({"format": 1, "shards": checkpoint.shards, "parts": parts}) + "\n")
    beside.rename(out)
    return out


def unpack_model(source: Path, out: Path) -> Path:
    """The inverse of :func:`pack_model`: the same tensors, bit for bit, in the same files.

    Raises:
        FedgroveError: a part is missing or damaged, or a newer fedgrove packed it.
    """
    layout = _layout(source / PACKED)
    part_of = {name: number for number, names in enumerate(layout["parts"]) for name in names}

    @lru_cache(maxsize=1)
    def part(number: int) -> dict[str, Tensor]:
        tensors = _open_packed(source / _part(number))
        if tensors.keys() != set(layout["parts"][number]):
            raise FedgroveError(f"{source / PACKED}: it does not belong to {_part(number)}; copy it again")
        return tensors

    beside = _beside(out)
    for file, content in _open_packed(source / FILES).items():
        (beside / Path(file).name).write_bytes(raw_bytes(content))
    for shard, names in layout["shards"].items():
        specs = {name: (part(part_of[name])[name].shape, part(part_of[name])[name].dtype) for name in names}
        write_safetensors(beside / Path(shard).name, specs, (part(part_of[name])[name] for name in names))
    beside.rename(out)
    return out


def _layout(file: Path) -> dict[str, Any]:
    """Which tensors lie in which part, and in which file of the model."""
    try:
        layout: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if layout["format"] != 1:
            raise FedgroveError(f"{file}: format {layout['format']} is unknown here; update fedgrove")
        in_parts = sorted(name for names in layout["parts"] for name in names)
        in_shards = sorted(name for names in layout["shards"].values() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise FedgroveError(f"{file}: missing or damaged; copy it again") from fault
    if in_parts != in_shards:
        raise FedgroveError(f"{file}: missing or damaged; copy it again")
    return layout


def _open_packed(file: Path) -> dict[str, Tensor]:
    try:
        return wire.unpack(file.read_bytes())[0]
    except (OSError, wire.WireError) as fault:
        raise FedgroveError(f"{file}: missing or damaged; copy it again") from fault


def model_card(job: Job, base: Path) -> str:
    """The README.md of a result in the Hugging Face form: what was done, by whom, then the card of the model it came from."""
    card = (base / "README.md").read_text(encoding="utf-8") if (base / "README.md").is_file() else ""
    front = "library_name: transformers\npipeline_tag: text-generation\n"
    if card.startswith("---\n") and "\n---\n" in card[4:]:
        front, card = card[4:].split("\n---\n", 1)
        front += "\n"
    owners = ", ".join(client.name for client in job.clients)
    done = "\n".join(_done(stage) for stage in job.stages)
    return (
        f"---\n{front}---\n# {job.name}\n\nMade with fedgrove by {len(job.clients)} owners of text together ({owners}); "
        f"no text left its owner.\n\n{done}\n\n{_loads(job)}\n\nThe card of that model follows.\n\n{card.strip()}\n"
    )


def _loads(job: Job) -> str:
    if isinstance(job.stages[0], NarrowStage):
        return (
            "Its blocks are narrower than those of the model it came from, all alike, and nothing else is special about them: "
            "`config.json` says how wide they are, and any program that reads it loads this model."
        )
    return "Pruned weights are exact zeros in dense safetensors: any program that loads the model it came from loads this one."


def _done(stage: NarrowStage | PruneStage | TuneStage) -> str:
    if isinstance(stage, NarrowStage):
        return (
            f"- narrow: {stage.channels:g} of the MLP channels and {stage.heads:g} of the groups of heads cut out of every "
            f"block, those of the lowest {stage.score} score; {stage.samples} windows of {stage.length} tokens from each client"
        )
    if isinstance(stage, TuneStage):
        return (
            f"- tune: {stage.method}, rule {stage.rule}, {stage.rounds} rounds of {stage.steps} steps; merged into the weights"
        )
    return (
        f"- {stage.kind}: {stage.pruner}, rule {stage.rule}, sparsity {stage.target} of every linear, {stage.samples} windows "
        f"of {stage.length} tokens from each client, rounds: {stage.rounds}"
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _beside(out: Path) -> Path:
    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def _part(number: int) -> str:
    return f"model-{number + 1:05d}.packed"
