"""JSON from another party: refused unless every number is finite and of ordinary size, and every key is given once.

Python's own reader accepts NaN, infinity, numbers of any length, keys that are given twice and text that is not Unicode.
Here these are errors, and so are texts that are too long or nested too deeply, so reading takes bounded time.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_BYTES = 2**24  # of a whole text; a message about a block has a few hundred kilobytes at most
MAX_DEPTH = 32  # lists and objects within each other; the deepest message has 10
MAX_DIGITS = 64  # characters of a number; Python writes floats with 25 at most
INT_BITS = 64  # every |integer| must be below 2^64


def loads(data: bytes | str) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: it is not JSON, or breaks a rule of this file; says which.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"JSON of {len(data)} bytes, more than {MAX_BYTES}")
    try:
        value = json.loads(
            data, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer, object_pairs_hook=_unique_keys
        )
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    _check_depth_and_text(value)
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError("a number that is too large or too long")
    return value


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= MAX_DIGITS else 2**INT_BITS
    if abs(value) >= 2**INT_BITS:
        raise ValueError("a number that is too large or too long")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that is given twice")
    return result


def _check_depth_and_text(value: Any) -> None:
    """Refuses nesting beyond ``MAX_DEPTH``, and strings with lone surrogates, which no file or terminal can take."""
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and not one.isascii():
                one.encode()  # UnicodeEncodeError is a ValueError
        level, depth = below, depth + 1
        if depth > MAX_DEPTH:
            raise ValueError("JSON that is nested too deeply")
