"""The one place where a value of a record becomes text. What is no text is refused, never written as Python would show it."""

from __future__ import annotations

import datetime
import decimal
import math
import re
from collections.abc import Mapping
from typing import Any

from fedgrove.data.tally import Tally
from fedgrove.errors import FedgroveError

_SURROGATES = re.compile("[\ud800-\udfff]")


def text_of(value: Any, where: str, field: str, tally: Tally) -> str:
    """A field's value as text.

    Text, whole numbers, finite numbers, dates and times become text; null and NaN are empty. A surrogate without its partner,
    which no tokenizer takes, becomes U+FFFD, and ``tally`` counts it.

    Raises:
        FedgroveError: the value is anything else: a list, an object, true or false, bytes, infinity.
    """
    if isinstance(value, str):
        return clean(value, tally)
    if value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value)):
        return ""
    is_number = isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool)
    if (is_number and math.isfinite(value)) or isinstance(value, datetime.date | datetime.time):
        return str(value)
    raise FedgroveError(f"{where}: the field {field!r} holds {kind_of_value(value)}", "name a text field")


def clean(text: str, tally: Tally) -> str:
    """The text with U+FFFD for every surrogate without its partner."""
    if text.isascii():
        return text
    cleaned, replaced = _SURROGATES.subn("\ufffd", text)
    tally.replaced += replaced
    return cleaned


def kind_of_value(value: Any) -> str:
    """What a value is, in the words of an error."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float | decimal.Decimal):
        return "infinity"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes"
    return f"a {type(value).__name__}"


def as_json(value: Any) -> Any:
    """The value as JSON can hold it: dates, times and decimal numbers as text, every text cleaned."""
    if isinstance(value, str):
        return clean(value, Tally())
    if isinstance(value, Mapping):
        return {clean(str(key), Tally()): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def holds_bytes(value: Any) -> bool:
    """Whether bytes are anywhere in a value."""
    if isinstance(value, Mapping):
        return any(map(holds_bytes, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_bytes, value))
    return isinstance(value, bytes | bytearray | memoryview)
