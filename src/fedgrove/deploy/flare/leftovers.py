"""A site's working files of a run: what is removed when the run has ended in any way, and what has to stay.

Token ids, hidden states, weights that the server sent and the secrets of a secure sum are removed; a run that is
continued makes them again. What stays is what the site must not forget: the terms that it agreed to, the noisy
responses that it has released, the sessions that are over, its own best adapter, and its candidates for a model of its own.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from fedgrove.deploy.flare.files import SiteFile
from fedgrove.privacy.secagg.store import SessionStore

AGREED = "agreed.json"  # every folder of a run has it; others in ``work`` are not ours, and are left alone
KEPT = (AGREED, "released.json", "released-*.safetensors", "best-*", "candidates-*", "personal", "speed.json", "secure")
DAY = 24 * 3600.0


def run_folders(kit: Path, settings: SiteFile) -> list[Path]:
    """The folders of runs among a site's working files."""
    return sorted(
        folder
        for folder in (kit / settings.work).glob("*")
        if (folder / AGREED).is_file() and folder.is_dir() and not folder.is_symlink()
    )


def clean(folder: Path) -> int:
    """Removes the working files of a run that must not stay; returns how many files and folders were removed.

    Symbolic links are removed, not followed.
    """
    removed = 0
    for entry in _doomed(folder):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
        removed += 1
    return removed + SessionStore(folder / "secure").end_all()


def clean_old(kit: Path, settings: SiteFile) -> list[Path]:
    """Cleans the folders of runs in which nothing was written for ``keep`` days; returns those that had something left."""
    before = time.time() - settings.keep * DAY
    return [folder for folder in run_folders(kit, settings) if _last_written(folder) < before and clean(folder)]


def _doomed(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if not any(fnmatch(entry.name, pattern) for pattern in KEPT):
            yield entry


def _last_written(folder: Path) -> float:
    return max(entry.lstat().st_mtime for entry in (folder, *folder.rglob("*")))
