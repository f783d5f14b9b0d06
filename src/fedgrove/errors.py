"""The one error that is shown to a user as a line instead of a traceback."""

from __future__ import annotations


class FedgroveError(Exception):
    """An error that the user can fix. Everything else that is raised is a defect of fedgrove.

    ``str()`` of it is one line: ``client 'NAME': WHAT; REMEDY``. The command line prints it on standard error and ends with
    status 2.

    Attributes:
        what: what is wrong; names the key, file or option.
        remedy: what to do about it; None where ``what`` says that as well, or where it is obvious.
        client: whose text, model or machine it is; None: nobody's in particular.
    """

    def __init__(self, what: str, remedy: str | None = None, *, client: str | None = None):
        # Exception's __init__ is not called: args stay what the class was called with, so that subclasses unpickle too.
        self.what = what
        self.remedy = remedy
        self.client = client

    def __str__(self) -> str:
        line = self.what if self.client is None else f"client '{self.client}': {self.what}"
        if self.remedy is not None:
            line += f"; {self.remedy}"
        return " ".join(line.split())


def first_line(error: BaseException) -> str:
    """What a library's exception says, in one line; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
