"""A site's settings, log and leftovers, for the process that FLARE starts, which loads no model and imports none."""

from __future__ import annotations

import os
import re
import time
import traceback
from contextlib import suppress
from pathlib import Path

from fedgrove.deploy.flare import leftovers
from fedgrove.deploy.flare.files import SITE, SiteFile, read
from fedgrove.errors import FedgroveError
from fedgrove.escape import printable

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def threads(kit: Path) -> int:
    """The number of threads of the working process: ``threads`` in ``site.toml``, else one per core."""
    try:
        return read(kit / SITE, SiteFile).threads or os.cpu_count() or 1
    except FedgroveError:
        return 1  # respond() reports that the file is not valid


def end_run(kit: Path, run: str) -> None:
    """Removes what must not stay of a run that has ended in any way; after a success nothing is left already."""
    try:
        settings = read(kit / SITE, SiteFile)
        folder = kit / settings.work / run
        if RUN_NAME.fullmatch(run) and folder in leftovers.run_folders(kit, settings):
            leftovers.clean(folder)
    except Exception:
        write_log(kit, traceback.format_exc())


def write_log(kit: Path, text: str) -> None:
    """Appends a line, or a trace, to the site's own log. Errors are ignored, so that a full disk does not lose a response.

    Only the first line begins at the margin, with the time: no request can write a line that looks like the log's own.
    """
    lines = [printable(line) for line in text.rstrip().splitlines()]
    log = kit / "log" / "site.log"
    with suppress(OSError):
        log.parent.mkdir(exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} " + "\n    ".join(lines) + "\n")
