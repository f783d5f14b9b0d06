"""What reading a source came upon, for ``doctor`` to say."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts of one source; every reader adds to the tally that it is given.

    Attributes:
        files: the number of files that were read.
        passed_over: names of files of a folder that were not read, because they hold no records or text of the owner.
        replaced: the number of surrogates without their partner that became U+FFFD.
        guessed: what was guessed about a file, such as the separator of a CSV file.
    """

    files: int = 0
    passed_over: list[str] = field(default_factory=list)
    replaced: int = 0
    guessed: list[str] = field(default_factory=list)
