"""What a round of tuning consists of: a file for each kind, which parametrizations name (``LOOP``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fedgrove import plugins

if TYPE_CHECKING:
    from fedgrove.stages.tune.tuning import Tuning

PACKAGE = "stages.tune.loops"


class HasLoop(Protocol):
    """The contract of a file.

    Attributes:
        Loop: a subclass of :class:`~fedgrove.stages.tune.tuning.Tuning`.
    """

    Loop: Any


METHOD = HasLoop


def loop_of(name: str) -> type[Tuning]:
    """Loads the class that runs rounds."""
    loop: type[Tuning] = plugins.load(PACKAGE, name).Loop
    return loop
