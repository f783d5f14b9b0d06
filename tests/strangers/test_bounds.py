"""Numbers and text from another party: hostile ones are refused by name, in bounded time, and never reach a terminal raw."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from fedgrove.client import serve
from fedgrove.rounds import strict_json, wire
from fedgrove.rounds.request import RequestError
from fedgrove.rounds.wire import WireError


def forge(info: str | bytes) -> bytes:
    """A message without tensors and with a right checksum, whose JSON is this text."""
    info = info.encode() if isinstance(info, str) else info
    pieces = {"header": np.frombuffer(b'{"info":' + info + b',"tensors":[]}', np.uint8)}
    crc = zlib.crc32(pieces["header"].tobytes(), zlib.crc32(b"header"))
    message: bytes = safetensors.numpy.save({"checksum": np.frombuffer(struct.pack("<I", crc), np.uint8), **pieces})
    return message


NUMBERS = {
    "NaN": "NaN",
    "infinity": "Infinity",
    "minus infinity": "-Infinity",
    "a float that is infinite": "1e999",
    "a negative float that is infinite": "-1.5e400",
    "an integer of 65 bits": str(2**64),
    "a negative integer of 65 bits": str(-(2**64)),
    "an integer of 400 digits": "9" * 400,
    "an integer of a million digits": "1" + "0" * 10**6,
    "a fraction of a million digits": "0." + "1" * 10**6,
    "an exponent of a million digits": "1e-" + "1" * 10**6,
}
PLACES = {
    "a value": '{{"a":{}}}',
    "in a list": '{{"a":[1,{}]}}',
    "nested": '{{"a":{{"b":[[{}]]}}}}',
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_that_is_not_finite_or_of_absurd_size_is_no_message(number: str, place: str) -> None:
    with pytest.raises(WireError) as error:
        wire.unpack(forge(PLACES[place].format(NUMBERS[number])))
    assert len(str(error.value)) < 200


ODD = {
    "a key twice": '{"a":1,"a":1}',
    "a key twice, nested": '{"x":[{"a":1,"b":2,"a":3}]}',
    "a key twice, escaped": '{"a":1,"\\u0061":2}',
    "33 lists": '{"a":' + "[" * 33 + "]" * 33 + "}",
    "900 lists": '{"a":' + "[" * 900 + "]" * 900 + "}",
    "a million lists": '{"a":' + "[" * 10**6 + "]" * 10**6 + "}",
    "a million objects": '{"a":' * 10**6 + "1" + "}" * 10**6,
    "a lone surrogate": '{"a":"\\ud800"}',
    "a lone surrogate as a key": '{"\\udc00":1}',
    "too long": '{"a":"' + "x" * strict_json.MAX_BYTES + '"}',
}


@pytest.mark.parametrize("what", ODD)
def test_odd_json_is_no_message(what: str) -> None:
    with pytest.raises(WireError):
        wire.unpack(forge(ODD[what]))


def test_ordinary_json_is_a_message() -> None:
    """Else the refusals above might have another reason."""
    info: dict[str, Any] = {
        "zero": -0.0, "tiny": 5e-324, "large": 1.7976931348623157e308, "id": 2**64 - 1, "low": -(2**63), "text": "Füße 💧",
        "deep": [[[[[[[[[[{}]]]]]]]]]], "none": None, "true": True,
    }  # fmt: skip
    again = wire.unpack(forge(json.dumps(info)))[1]
    assert again == info
    assert str(again["zero"]) == "-0.0"
    assert wire.unpack(wire.pack({}, info))[1] == info


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_request_whose_tensors_are_not_finite_is_refused_by_name(value: float, dtype: torch.dtype) -> None:
    tensors = {"start/q": torch.ones(2, 3, dtype=dtype), "start/v": torch.full((1,), value, dtype=dtype)}
    message = wire.pack(tensors, {"request": {"stage": 0, "part": 0}})
    with pytest.raises(RequestError, match="start/v") as error:
        serve.read("tune/base", message)
    assert error.value.field == "start/v"
