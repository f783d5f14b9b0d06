"""Settings of glibc, the C library of Linux, for freed memory. Other systems have no such functions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

MMAP_THRESHOLD = 8 << 20  # bytes; larger allocations are returned to the system as soon as they are freed
TRIM_THRESHOLD = 64 << 20  # free bytes at the end of the heap, above which they are returned to the system
TIGHT = 0.75  # of its memory a process takes before it is held to it
_limits: list[int | None] = [None]  # bytes; the last one holds
_SETTINGS = {  # the parameter's number in mallopt(3): the environment variable for new processes, the value
    -3: ("MALLOC_MMAP_THRESHOLD_", MMAP_THRESHOLD),
    -1: ("MALLOC_TRIM_THRESHOLD_", TRIM_THRESHOLD),
}


def keep_large_apart() -> None:
    """Makes the C library allocate large tensors outside the heap, because they would fragment it.

    This reduces a client's memory by a sixth.

    Smaller tensors stay on the heap, because mapping new memory pages takes time: with half of ``MMAP_THRESHOLD``, a
    block's activations were allocated outside the heap, and a client took 10 % longer.

    Applies to this process and, through environment variables, to its child processes. Variables that are set already
    are not changed.
    """
    for number, (variable, value) in _SETTINGS.items():
        if variable not in os.environ:
            os.environ[variable] = str(value)
            with suppress(AttributeError, OSError, TypeError):
                ctypes.CDLL(None).mallopt(number, value)


def release_freed_memory() -> None:
    """Returns freed memory to the system.

    Without it the freed memory is too fragmented for the next response, so memory grows with the number of clients.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def limited(memory: int | None) -> Iterator[None]:
    """Within it :func:`release_if_tight` holds this process to so many bytes; None: to what the machine has."""
    _limits.append(memory)
    try:
        yield
    finally:
        _limits.pop()


def release_if_tight() -> None:
    """Returns freed memory to the system if this process has most of what it may have.

    glibc does not put a tensor where one of the same size was freed, because tensors are aligned. Training with SmolLM2 and
    four windows of 512 tokens so takes 6.4 GB instead of 4.2. But memory that was returned is new pages when it is needed
    again, and a step takes up to a quarter longer.
    """
    limit, machine = _limits[-1], psutil.virtual_memory()
    tight = machine.available < (1 - TIGHT) * machine.total
    if limit is not None:
        tight = tight or psutil.Process().memory_info().rss > TIGHT * limit
    if tight:
        release_freed_memory()
