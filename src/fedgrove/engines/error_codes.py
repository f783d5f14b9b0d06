"""What a site reveals about an error: a code, the name of the exception's class and at most one word, never its text.

The text of an exception may name files or quote data, so it stays in the site's own log. The server turns the code into
a message.
"""

from __future__ import annotations

import errno
import importlib.metadata
import re
from typing import Any

from fedgrove.client.completions import EndpointError
from fedgrove.errors import FedgroveError
from fedgrove.privacy.secagg.session import OtherSurvivors

VERSION = importlib.metadata.version("fedgrove")
MESSAGES = {
    "version": "its fedgrove is {word}, this one is " + VERSION + "; install the same version",
    "refused": "it refuses what the job asks ({word} in its site.toml)",
    "terms": "it refuses a request that is not part of the job it agreed to ({word})",
    "model": "its model differs from the job's at {word}; copy the model there again",
    "roster": "its roster is number {word}, not the job's; give every site the newest roster (secure/), and submit again",
    "models": "it has no model of that name ([models] in its site.toml)",
    "site-file": "its site.toml is not valid; `fedgrove federation doctor` there says why",
    "joined": "it has not agreed to this run; continue with --resume",
    "survivors": "it is already in this sum with other clients; continue with --resume when they are back, "
    "or run the job under another name",
    "data": "{name} in its handler; its text or settings are wrong, and its own log/site.log says why",
    "endpoint": "its endpoint does not do its part ({word}); its own log/site.log says why",
    "disk": "its disk is full; free some space there",
    "memory": "out of memory; raise limit in its site.toml, or lower samples or length",
    "killed": "its working process was killed (status {word}); out of memory? Lower samples or length",
    "late": "no response in {word} s (rounds.timeout)",  # the server's own words: its clock or the site's may be first
    "error": "{name} in its handler; the trace is in its own log/site.log",
}
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,64}")


class Stopped(FedgroveError):
    """The run was stopped by a user."""


class Refusal(FedgroveError):
    """A site refuses a request.

    Attributes:
        code: a key of ``MESSAGES``.
        word: the key, field or part of the model that is the reason; empty: none.
    """

    def __init__(self, code: str, word: str = ""):
        super().__init__(MESSAGES[code].format(word=word, name="Refusal"))
        self.code, self.word = code, word


def encode(code: str, name: str, word: str = "") -> str:
    """An error as it is sent: "CODE CLASS" or "CODE CLASS WORD".

    Args:
        code: a key of ``MESSAGES``.
        name: the name of the exception's class.
        word: see :class:`Refusal`.
    """
    return f"{code} {plain(name)} {plain(word)}".strip()


def encode_exception(error: BaseException) -> str:
    """An exception as it is sent: without its text."""
    name = type(error).__name__
    if isinstance(error, Refusal):
        return encode(error.code, name, error.word)
    if isinstance(error, OtherSurvivors):
        return encode("survivors", name)
    if isinstance(error, EndpointError):
        return encode("endpoint", name, error.word)
    if isinstance(error, FedgroveError):
        return encode("data", name)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return encode("disk", name)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "OutOfMemory" in name:
        return encode("memory", name)
    return encode("error", name)


def message(received: Any) -> str:
    """The server's message for an error that a site sent. Anything but a code of :func:`encode` is not shown."""
    parts = received.split(" ") if isinstance(received, str) else []
    if not 2 <= len(parts) <= 3 or parts[0] not in MESSAGES or not all(_WORD.fullmatch(part) for part in parts):
        return "it sent an error that is not one of fedgrove's"
    return MESSAGES[parts[0]].format(name=parts[1], word=parts[2] if len(parts) > 2 else "?")


def plain(word: Any) -> str:
    """The letters, digits and ``_.+-`` of a word, at most 64 characters."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "", str(word))[:64]
