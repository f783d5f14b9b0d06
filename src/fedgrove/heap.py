"""What the C library of Linux does with memory that was freed. Other systems have no such functions and no such need."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

LARGE = 8 << 20  # bytes; an allocation from here on is the system's again as soon as it is freed
HELD = 64 << 20  # bytes that may lie free at the end of what smaller ones are taken from
_SETTINGS = {  # of mallopt(3): its number, the variable that a new process reads, the value
    -3: ("MALLOC_MMAP_THRESHOLD_", LARGE),
    -1: ("MALLOC_TRIM_THRESHOLD_", HELD),
}


def keep_large_apart() -> None:
    """Lets no large tensor leave a hole that the next one does not fit into, which saves a client a sixth of its memory.

    Smaller ones go on sharing the heap, for new pages take time: with half of ``LARGE`` a block's activations were among the
    large, and took a client a tenth longer.

    For this process, and through the environment for those that it starts. What is set there already is left alone.
    """
    for number, (variable, value) in _SETTINGS.items():
        if variable not in os.environ:
            os.environ[variable] = str(value)
            with suppress(AttributeError, OSError, TypeError):
                ctypes.CDLL(None).mallopt(number, value)


def release_freed_memory() -> None:
    """Lets the system have what was freed: kept in pieces that the next answer does not fit into, it would grow with the
    number of clients after all."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
