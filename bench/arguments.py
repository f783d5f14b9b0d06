"""Types of the benchmarks' arguments."""

from __future__ import annotations

import argparse
from pathlib import Path


def existing_folder(text: str) -> Path:
    """A folder that exists, so that a wrong path ends a benchmark before its first run, with one line."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return path
