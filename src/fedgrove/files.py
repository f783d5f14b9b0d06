"""Files and folders that are there completely or not at all, whenever a process is killed; and lines of JSON.

What is being written has its final name with ``.partial`` after it. One that is left behind is overwritten the next time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes, *, mode: int | None = None, fsync: bool = False) -> None:
    """Writes a file, with the folders above it; an existing one is replaced.

    Args:
        content: text is written as UTF-8.
        mode: permissions such as 0o600, for a secret: nobody else can open the file while it is written either.
        fsync: return only when the file would survive a power failure.
    """
    with atomic_file(path) as partial:
        if mode is not None:
            partial.unlink(missing_ok=True)  # one that is left behind may have other permissions
        with open(partial, "wb" if mode is None else "xb", opener=_opener(mode)) as file:  # Path.open has no opener
            file.write(content.encode() if isinstance(content, str) else content)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
    if fsync:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name
        finally:
            os.close(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, for a file that is written piece by piece; it becomes ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write to; it becomes ``path`` when the block ends well and is removed when it does not.

    Args:
        replace: an existing ``path`` is removed first; without it that is an error.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if there is no file. A last line that a kill cut short is passed over."""
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole if line]


def _opener(mode: int | None) -> Callable[[str, int], int] | None:
    return None if mode is None else lambda path, flags: os.open(path, flags, mode)
