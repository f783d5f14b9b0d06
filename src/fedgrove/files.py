"""Atomic writing of files and folders, so that a killed process leaves none that is incomplete; and reading JSON lines.

Content is written to the final name plus ``.partial`` and then renamed. A leftover partial file is overwritten.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRACE = "error.log"  # a client's file with the trace of an error that is not the user's


@contextmanager
def private_files() -> Iterator[None]:
    """Files and folders that are made within can be read by their owner only: umask 077, for the whole process."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write_atomically(path: Path, content: str | bytes, *, mode: int | None = None, fsync: bool = False) -> None:
    """Writes a file atomically; creates missing parent folders and replaces an existing file.

    Args:
        path: the file.
        content: text is written as UTF-8.
        mode: permissions such as 0o600, for a secret: they also hold while the file is written.
        fsync: return only when the file would survive a power failure.
    """
    with atomic_file(path) as partial:
        if mode is not None:
            partial.unlink(missing_ok=True)  # a leftover file may have other permissions
        with open(partial, "wb" if mode is None else "xb", opener=_opener(mode)) as file:  # Path.open has no opener
            file.write(content.encode() if isinstance(content, str) else content)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
    if fsync:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # also makes the renaming permanent
        finally:
            os.close(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file written in pieces; renamed to ``path`` if the block does not raise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder; it is renamed to ``path`` if the block does not raise, and removed if it does.

    Args:
        path: the final folder.
        replace: remove an existing ``path`` before renaming. Otherwise a ``path`` that is not an empty folder is an
            error.
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
    """The objects of a JSON-lines file; none if there is no file. An incomplete last line is ignored."""
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole if line]


def _opener(mode: int | None) -> Callable[[str, int], int] | None:
    return None if mode is None else lambda path, flags: os.open(path, flags, mode)
