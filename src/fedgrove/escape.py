"""Text from another party, made safe for a log or a terminal.

The gates where it is applied: errors (:class:`fedgrove.errors.FedgroveError`), progress (:mod:`fedgrove.progress`), what a
server tells an operator (:mod:`fedgrove.events`, ``fedgrove federation status``), and the logs of a run and of a site.
JSON and HTML have escapes of their own.
"""

from __future__ import annotations

MAX_TEXT = 2000  # characters of a line; longer ones are cut
MAX_WORD = 80  # characters of a name or a key within a line


def printable(text: str, most: int = MAX_TEXT) -> str:
    r"""One line: characters that cannot be printed become escapes, and a long text is cut.

    Control characters would move a terminal's cursor, a newline would begin a line of a log that nobody wrote, and marks of
    direction would show a name backwards.

    >>> printable("ash\x1b[2J\nbirch: all is well")
    'ash\\x1b[2J\\nbirch: all is well'
    >>> printable("a" * 20, most=8)
    'aaaaaaa…'
    """
    cut = text if len(text) <= most else text[: most - 1] + "…"
    if cut.isprintable():
        return cut
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in cut)
