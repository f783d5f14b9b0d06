"""The wire: what goes in comes out, small; and whatever a stranger sends is a WireError, not a crash and not a full memory."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.masks import Target
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds import wire
from fedgrove.rounds.wire import DTYPES, WireError, check, estimate, pack, unpack
from fedgrove.stages.prune.pruners import magnitude

SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (16, 33), (2, 3, 4, 5)]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, name
        assert got[name].dtype == tensor.dtype, name
        assert bits(got[name]) == bits(tensor), name


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Any bits at all: NaN payloads, infinities, subnormal numbers."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=random).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=random, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {
        "any": random_bits(shape, DTYPES[name], random),
        "zeros": torch.zeros(shape, dtype=DTYPES[name]),
        "ones": torch.ones(shape, dtype=DTYPES[name]),
        "sparse": random_bits(shape, DTYPES[name], random) * torch.randint(0, 2, shape, generator=random).bool(),
    }
    got, info = unpack(pack(tensors, {"a": [1, "ü", None, 0.5]}))
    assert_same(got, tensors)
    assert info == {"a": [1, "ü", None, 0.5]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_minus_zero_nan_and_infinity_keep_their_bits(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-7], dtype=dtype)
    for count in (1, 100):  # with few zeros and with many
        tensor = torch.cat([values, torch.zeros(8 * count, dtype=dtype)])
        got = unpack(pack({"x": tensor}, {}))[0]
        assert_same(got, {"x": tensor})
        assert torch.signbit(got["x"][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_a_change_travels_under_its_mask(dtype: torch.dtype, density: float) -> None:
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(40, 50, generator=random) < density
    weight = torch.randn(40, 50, generator=random).to(dtype).masked_fill(~mask, 0.0)
    kept = mask.nonzero()
    if len(kept):
        weight[tuple(kept[0])] = -0.0  # kept, and zero all the same
    tensors = {"change/x": weight, "weight/x": mask, "change/y": weight[0], "weight/y": torch.tensor(3.0)}
    assert_same(unpack(pack(tensors, {}))[0], tensors)
    alone = len(pack({"weight/x": mask}, {}))
    together = len(pack({"weight/x": mask, "change/x": weight}, {}))
    assert together - alone <= int(mask.sum()) * dtype.itemsize + 400


def test_tensors_that_do_not_lie_in_order_come_back() -> None:
    mask = torch.rand(5, 7) > 0.5
    tensors = {"change/x": torch.randn(5, 7).masked_fill(~mask, 0).T, "weight/x": mask.T, "y": torch.randn(4, 6)[::2, 1::2]}
    assert_same(unpack(pack(tensors, {}))[0], tensors)


def test_the_same_message_is_the_same_bytes_whatever_the_order_of_its_tensors() -> None:
    tensors = {name: torch.randn(9) for name in "cab"}
    assert pack(tensors, {"x": 1, "a": 2}) == pack(dict(sorted(tensors.items())), {"a": 2, "x": 1})


def test_no_tensors_at_all() -> None:
    assert unpack(pack({}, {})) == ({}, {})


@pytest.mark.parametrize("name", ["layers.0.self_attn.k_proj", "layers.2.self_attn.q_proj", "layers.5.mlp.gate_proj"])
def test_a_trained_weight_pruned_by_half_takes_two_fifths_of_its_dense_bytes(grove: Path, name: str) -> None:
    weight = Checkpoint(grove).read(f"model.{name}.weight")
    pruned, mask = magnitude.prune(weight.float(), InputStatistics("nothing"), Target(0.5))
    dense = weight.numel() * 2
    answer = len(pack({"change/x": pruned.bfloat16(), "weight/x": mask}, {}))
    assert answer <= 0.40 * dense
    assert len(pack({"x": pruned.bfloat16()}, {})) <= 0.40 * dense
    assert answer == pytest.approx(estimate(weight.numel(), 0.5, torch.bfloat16), rel=0.05)


def test_a_mask_costs_at_most_a_bit() -> None:
    assert len(pack({"weight/x": torch.rand(256, 256) > 0.5}, {})) <= 256 * 256 / 8 + 400
    assert len(pack({"x": torch.zeros(10**6)}, {})) < 20_000


def forge(header: Any, pieces: dict[str, bytes] | None = None) -> bytes:
    """A message with a right checksum, whatever it says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in ({"header": raw} | (pieces or {})).items()}
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].tobytes(), zlib.crc32(name.encode(), crc))
    return safetensors.numpy.save({"checksum": np.frombuffer(struct.pack("<I", crc), np.uint8), **arrays})


def take_apart(message: bytes) -> tuple[Any, dict[str, bytes]]:
    pieces = {name: piece.tobytes() for name, piece in safetensors.numpy.load(message).items()}
    del pieces["checksum"]
    return json.loads(pieces.pop("header")), pieces


def sample() -> bytes:
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(24, 30, generator=random) > 0.5
    tensors = {
        "change/q": torch.randn(24, 30, generator=random).bfloat16().masked_fill(~mask, 0.0),
        "weight/q": mask,
        "window/0": torch.randint(0, 4096, (1, 64), generator=random).int(),
        "sparse": torch.randn(200, generator=random).relu(),
        "weight/k": torch.tensor(8192.0, dtype=torch.float64),
    }
    return pack(tensors, {"block": 3, "seed": "0/0"})


@cache
def bomb(size: int) -> bytes:
    """That many zeros in a thousandth of the bytes."""
    squeeze = zlib.compressobj(9, wbits=-15)
    return b"".join(squeeze.compress(bytes(min(size, 2**20))) for _ in range(max(1, size >> 20))) + squeeze.flush()


def row(name: str = "x", dtype: str = "uint8", shape: Any = (4,)) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape}


def message(*rows: Any, **pieces: bytes) -> bytes:
    return forge({"info": {}, "tensors": list(rows)}, {name[1:].replace("_", "."): data for name, data in pieces.items()})


HOSTILE = {
    "empty": b"",
    "a few bytes": b"\x08\0\0\0\0\0\0\0{}",
    "not safetensors": b"PK\3\4" * 100,
    "header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "no header": safetensors.numpy.save({"0.0": np.zeros(4, np.uint8)}),
    "no checksum": safetensors.numpy.save({"header": np.frombuffer(b'{"info":{},"tensors":[]}', np.uint8)}),
    "parts that are no bytes": safetensors.numpy.save({"header": np.zeros((2, 2), np.float32)}),
    "header is no JSON": forge(b"\xff\xfe{"),
    "header is nested deep": forge(b"[" * 200_000),
    "header is a list": forge([1, 2]),
    "header is a number": forge(7),
    "header with a number of 10,000 digits": forge(b'{"info":{},"tensors":[' + b"9" * 10_000 + b"]}"),
    "info is no object": forge({"info": [], "tensors": []}),
    "info is missing": forge({"tensors": []}),
    "tensors is a number": forge({"info": {}, "tensors": 3}),
    "tensors is a string": forge({"info": {}, "tensors": "abc"}),
    "tensors is an object": forge({"info": {}, "tensors": {"a": 1}}),
    "row is null": message(None),
    "row is a list": message(["x"]),
    "name is null": message({**row(), "name": None}, _0_0=b"1234"),
    "name is a list": message({**row(), "name": ["x"]}, _0_0=b"1234"),
    "name is given twice": message(row(), row(), _0_0=b"1234", _1_0=b"1234"),
    "dtype is unknown": message(row(dtype="object"), _0_0=b"1234"),
    "dtype is a list": message({**row(), "dtype": []}, _0_0=b"1234"),
    "shape is a number": message(row(shape=4), _0_0=b"1234"),
    "shape is a string": message(row(shape="4"), _0_0=b"1234"),
    "shape is an object": message(row(shape={}), _0_0=b"1"),
    "shape is an object of numbers": message(row(shape={"4": 1}), _0_0=b"1234"),
    "shape is negative": message(row(shape=(-2, -2)), _0_0=b"1234"),
    "shape is a fraction": message(row(shape=(4.0,)), _0_0=b"1234"),
    "shape is true": message(row(shape=[True] * 3), _0_0=b"1"),
    "shape is huge": message(row(shape=(2**62,)), _0_0=b"1234"),
    "shape is beyond 64 bits": message(row(shape=(2**80,)), _0_0=b"1234"),
    "shape overflows": message(row(shape=(2**40, 2**40)), _0_0=b"1234"),
    "shape is empty and overflows": message(row(shape=(0, 2**40, 2**40)), _0_0=b""),
    "shape is empty and beyond 64 bits": message(row(shape=(0, 2**80)), _0_0=b""),
    "shape has a hundred thousand dimensions": message(row(shape=[1] * 10**5), _0_0=b"1"),
    "shape has a hundred thousand large dimensions": message(row(shape=[2**62] * 10**5), _0_0=b"1"),
    "huge and all bits": message(row(dtype="bool", shape=(2**45,)), _0_mask=bomb(2**20)),
    "huge under its own mask": message(row(dtype="float64", shape=(2**45,)), _0_mask=bomb(2**20)),
    "zip bomb": message(row(shape=(2**27,)), _0_0=bomb(2**27)),
    "zip bomb in a mask": message(row(dtype="bool", shape=(2**30,)), _0_mask=bomb(2**27)),
    "zip bomb that says it is small": message(row(shape=(8000,)), _0_0=bomb(2**27)[:4000]),
    "a stream cut short": message(row(shape=(400,)), _0_0=bomb(400)[:-1] + b"\0" * 60),
    "a part is missing": message(row(dtype="float32"), _0_0=b"1234", _0_1=b"1234", _0_2=b"1234"),
    "a part is too short": message(row(), _0_0=b"123"),
    "a part is too long": message(row(), _0_0=b"12345"),
    "a part too many": message(row(), _0_0=b"1234", _9_0=b"1"),
    "a mask without bits": message(row(dtype="bool", shape=(40,)), _0_mask=b"1"),
    "values without mask": message(row("weight/x", "bool"), row("change/x", "uint8"), _0_mask=b"\3", _1_0=b"1234"),
    "values of another count than the mask": message(row("x", "uint8", (8,)), _0_mask=b"\7", _0_0=b"1234"),
    "a change of another size than its mask": message(
        row("weight/x", "bool", (8,)), row("change/x", "uint8", (9,)), _0_mask=b"\3", _1_0=b"12"
    ),
    "one mask for many": message(
        row("weight/x", "bool", (2**20,)),
        *(row("change/x", "float64", (2**20,)) for _ in range(1000)),
        _0_mask=bytes(2**17),
        **{f"_{i}_{k}": b"" for i in range(1, 1001) for k in range(8)},
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_message_is_refused_in_one_line(what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as fault:
            unpack(HOSTILE[what])
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert "\n" not in str(fault.value)
    assert len(str(fault.value)) < 200


def test_a_forged_message_that_is_right_is_read() -> None:
    """Else the refusals above might have another reason."""
    got = unpack(message(row("weight/x", "bool"), row("change/x", "uint8"), _0_mask=b"\3", _1_0=b"12"))[0]
    assert got["change/x"].tolist() == [49, 50, 0, 0]
    assert unpack(forge(*take_apart(sample())))[1] == {"block": 3, "seed": "0/0"}


def test_every_damaged_bit_and_every_cut_is_noticed() -> None:
    whole = sample()
    expected = unpack(whole)
    rng = random.Random(0)
    noticed = 0
    for trial in range(3000):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        elif trial % 4 == 1:
            at = rng.randrange(len(damaged))
            damaged[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif trial % 4 == 2:
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        else:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            got = unpack(bytes(damaged))
        except WireError:
            noticed += 1
        else:  # a byte replaced by itself, or one that only says how the parts lie in the file
            assert_same(got[0], expected[0])
            assert got[1] == expected[1]
    assert noticed > 2900


def test_whatever_the_header_says_the_answer_is_a_message_or_a_wire_error() -> None:
    """Mutations with a right checksum, so that every later check is reached."""
    header, pieces = take_apart(sample())
    rng = random.Random(1)
    values: list[Any] = [None, True, -1, 0, 1, 8, 31, 2**31, 2**63, 2**80, 0.5, "", "x", "bool", "bfloat16", "int64"]
    values += [[], [0], [24, 30], [720], [2**40], {}, {"a": 1}, "weight/q", "change/q", "weight/k"]
    refused = read = 0
    for _ in range(2000):
        mutant = json.loads(json.dumps(header))
        parts = dict(pieces)
        for _ in range(rng.randrange(1, 4)):
            act = rng.randrange(7)
            rows = mutant["tensors"] if isinstance(mutant.get("tensors"), list) else []
            some = rng.choice(rows) if rows else None
            key = rng.choice(sorted(parts)) if parts else "0.0"
            if act == 0 and isinstance(some, dict):
                some[rng.choice(["name", "dtype", "shape"])] = rng.choice(values)
            elif act == 1 and isinstance(some, dict) and isinstance(some.get("shape"), list) and some["shape"]:
                some["shape"][rng.randrange(len(some["shape"]))] = rng.choice(values)
            elif act == 2 and rows:
                rows[rng.randrange(len(rows))] = rng.choice(values)
            elif act == 3:
                mutant[rng.choice(["info", "tensors"])] = rng.choice(values)
            elif act == 4:
                parts[rng.choice([key, f"{rng.randrange(6)}.{rng.choice(['mask', '0', '1', '9'])}"])] = rng.randbytes(
                    rng.choice([0, 1, 3, 90, 720])
                )
            elif act == 5:
                parts.pop(key, None)
            elif parts.get(key):
                flipped = bytearray(parts[key])
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
                parts[key] = bytes(flipped)
        try:
            tensors, info = unpack(forge(mutant, parts))
        except WireError:
            refused += 1
        else:
            read += 1
            assert isinstance(info, dict)
            assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    assert refused > 500
    assert read > 50


def test_random_bytes_are_no_message() -> None:
    rng = random.Random(2)
    for size in range(0, 400):
        with pytest.raises(WireError):
            unpack(struct.pack("<Q", size // 2) + rng.randbytes(size))


def test_a_message_grows_at_most_512_fold() -> None:
    """The most that a sender can ask for: a mask of zeros, squeezed to a bit a byte, over eight-byte values."""
    numel = 2**20
    whole = pack({"x": torch.zeros(numel, dtype=torch.float64)}, {})
    assert 8 * numel < 512 * len(whole)
    header, pieces = take_apart(whole)
    header["tensors"][0]["shape"] = [numel * 2]
    with pytest.raises(WireError):
        unpack(forge(header, pieces))


def test_an_answer_other_than_the_one_that_was_asked_for_is_refused_by_name() -> None:
    asked = {"change/q": (torch.Size((4, 6)), torch.bfloat16), "weight/q": (torch.Size((4, 6)), torch.bool)}
    good = {"change/q": torch.ones(4, 6, dtype=torch.bfloat16), "weight/q": torch.ones(4, 6, dtype=torch.bool)}
    check(good, asked)

    def refused(change: dict[str, Tensor | None]) -> str:
        answer = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
        with pytest.raises(WireError) as fault:
            check(answer, asked)
        assert "\n" not in str(fault.value)
        return str(fault.value)

    assert refused({"weight/q": None}) == "weight/q is missing"
    assert "weight/z" in refused({"weight/z": torch.ones(1)})
    assert refused({"change/q": torch.ones(6, 4, dtype=torch.bfloat16)}) == "change/q has shape [6, 4], not [4, 6]"
    assert refused({"change/q": torch.ones(4, 6)}) == "change/q has dtype float32, not bfloat16"
    assert refused({"weight/q": torch.ones(4, 6)}) == "weight/q has dtype float32, not bool"
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = good["change/q"].clone()
        spoiled[2, 3] = bad
        assert refused({"change/q": spoiled}) == "change/q holds NaN or infinity"
    assert "\x1b" not in refused({"evil\x1b[2J\nname" * 100: torch.ones(1)})


def test_the_size_of_a_message_can_be_told_beforehand() -> None:
    random = torch.Generator().manual_seed(0)
    for sparsity in (0.3, 0.5, 0.8):
        weight = torch.randn(256, 256, generator=random) * 0.02
        pruned, mask = magnitude.prune(weight, InputStatistics("nothing"), Target(sparsity))
        for dtype in (torch.bfloat16, torch.float32):
            size = len(wire.pack({"change/x": pruned.to(dtype), "weight/x": mask}, {}))
            assert size == pytest.approx(estimate(weight.numel(), sparsity, dtype), rel=0.15)
