"""The error that users see as one line instead of a traceback."""

from __future__ import annotations

from fedgrove.escape import printable


class FedgroveError(Exception):
    """An error that the user can fix. Any other exception is a bug in fedgrove.

    ``str()`` of it is one line of printable characters: ``client 'NAME': WHAT; REMEDY``. The command line prints it on
    standard error and ends with status 2.

    Attributes:
        what: what is wrong; names the key, file or option.
        remedy: how to fix it; None if ``what`` includes that, or if it is obvious.
        client: the client whose text, model or machine has the error; None: no particular client.
    """

    def __init__(self, what: str, remedy: str | None = None, *, client: str | None = None):
        # Exception.__init__ is not called: args stay the constructor's arguments, so that subclasses unpickle.
        self.what = what
        self.remedy = remedy
        self.client = client

    def __str__(self) -> str:
        line = self.what if self.client is None else f"client '{self.client}': {self.what}"
        if self.remedy is not None:
            line += f"; {self.remedy}"
        return printable(" ".join(line.split()))


def first_line(error: BaseException) -> str:
    """What a library's exception says, in one line: its first line, with the second where the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
