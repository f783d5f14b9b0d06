"""What a site tells of what went wrong: a code, the name of a class, at most one word of ours. Never a text.

The text may name files or quote data; it stays in the site's own log. The server makes a line of the code.
"""

from __future__ import annotations

import errno
import importlib.metadata
import re
from typing import Any

from fedgrove.errors import FedgroveError

VERSION = importlib.metadata.version("fedgrove")
TOLD = {
    "version": "its fedgrove is {word}, this one is " + VERSION + "; install the same version",
    "refused": "it refuses what the job asks ({word} in its site.toml)",
    "terms": "it refuses an ask that the job it agreed to does not hold ({word})",
    "model": "its model differs from the job's at {word}; copy the model there again",
    "models": "it has no model of that name ([models] in its site.toml)",
    "site-file": "its site.toml does not hold together; `fedgrove federation doctor` there says where",
    "joined": "it has not agreed to this run; continue with --resume",
    "data": "{name} in its handler; its text or settings are at fault, and its own log/site.log says how",
    "disk": "its disk is full; free some space there",
    "memory": "out of memory; raise limit in its site.toml, or lower samples or length",
    "killed": "its working process was killed (status {word}); out of memory? Lower samples or length",
    "late": "it did not finish in time (rounds.timeout)",
    "fault": "{name} in its handler; the trace is in its own log/site.log",
}
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,64}")


class Stopped(FedgroveError):
    """Somebody stopped the run."""


class Refusal(FedgroveError):
    """What a site does not do: a code of ``TOLD`` and at most one word."""

    def __init__(self, code: str, word: str = ""):
        super().__init__(TOLD[code].format(word=word, name="Refusal"))
        self.code, self.word = code, word


def line(code: str, name: str, word: str = "") -> str:
    """What travels."""
    return f"{code} {plain(name)} {plain(word)}".strip()


def of(fault: BaseException) -> str:
    """What travels for an exception: its text does not."""
    name = type(fault).__name__
    if isinstance(fault, Refusal):
        return line(fault.code, name, fault.word)
    if isinstance(fault, FedgroveError):
        return line("data", name)
    if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return line("disk", name)
    if isinstance(fault, MemoryError) or "can't allocate memory" in str(fault) or "OutOfMemory" in name:
        return line("memory", name)
    return line("fault", name)


def told(travelled: Any) -> str:
    """The server's line for what a site sent; anything else than our own codes says nothing."""
    parts = travelled.split(" ") if isinstance(travelled, str) else []
    if not 2 <= len(parts) <= 3 or parts[0] not in TOLD or not all(_WORD.fullmatch(part) for part in parts):
        return "it answered with an error that is not one of fedgrove's"
    return TOLD[parts[0]].format(name=parts[1], word=parts[2] if len(parts) > 2 else "?")


def plain(word: Any) -> str:
    """A word that holds nothing but letters, digits and dots."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "", str(word))[:64]
