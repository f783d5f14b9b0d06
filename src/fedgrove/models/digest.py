"""One hash per block of a model: shows where two copies differ without sending them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from fedgrove.files import write_atomically
from fedgrove.models.stream import Checkpoint
from fedgrove.models.tensor_files import raw_bytes

ENDS, TOKENIZER = "ends", "tokenizer"


def digests(checkpoint: Checkpoint, cache: Path | None = None) -> dict[str, str]:
    """SHA-256 of every block's tensors (name, shape, dtype and values as read), of the other tensors, and of the tokenizer.

    Args:
        checkpoint: read tensor by tensor.
        cache: a file with the result; it is valid as long as the sizes and times of the model's files do not change.
    """
    files = [file for file in sorted(checkpoint.path.iterdir()) if file.is_file()]
    stamp = json.dumps(
        [str(checkpoint.path.resolve()), str(checkpoint.dtype), sorted(checkpoint.shares.items())]
        + [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    )
    if cache is not None and cache.is_file():
        cached = json.loads(cache.read_text(encoding="utf-8"))
        if cached["stamp"] == stamp:
            stored: dict[str, str] = cached["digests"]
            return stored
    sums: dict[str, hashlib._Hash] = {}
    for name in sorted(checkpoint.names()):
        number = re.search(r"\.(\d+)\.", name)
        part = sums.setdefault(f"block-{int(number[1]):04d}" if number else ENDS, hashlib.sha256())
        tensor = checkpoint.read(name)
        part.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        part.update(raw_bytes(tensor))
    tokenizer = checkpoint.path / "tokenizer.json"
    if tokenizer.is_file():
        sums[TOKENIZER] = hashlib.sha256(tokenizer.read_bytes())
    result = {part: digest.hexdigest() for part, digest in sorted(sums.items())}
    if cache is not None:
        write_atomically(cache, json.dumps({"stamp": stamp, "digests": result}))
    return result


def first_difference(one: dict[str, str], other: dict[str, str]) -> str | None:
    """The first part, by name, in which two models differ; None if they are equal."""
    return next((part for part in sorted(one.keys() | other.keys()) if one.get(part) != other.get(part)), None)
