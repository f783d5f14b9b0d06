"""The wire format: masks take one bit per entry, zeros nothing more, and values are sent as compressed byte planes.

The same code packs clients' responses and the file of a packed model. A packed message is a safetensors file: a ``header``
(JSON) and, for the i-th tensor, ``i.mask`` (its bits) and ``i.0``, ``i.1``, … (the first, second, … byte of every value). In
trained weights, the bytes with sign and exponent repeat and compress to a third, while mantissas do not compress; separate
planes make use of this. Compression is zlib with Huffman codes only, which on such bytes is both the fastest and the smallest
setting. A part that is as long as its content is uncompressed; a plane of zeros, except the first, is empty. A ``checksum``
(CRC-32) detects damaged messages.

Nothing in a received message is trusted before it is checked. Sizes follow from shapes and masks, and a Huffman code has at
least one bit, so a message is refused before it can take more than 512 times its own length in memory. The JSON is read by
:mod:`fedgrove.rounds.strict_json`: no NaN, no infinity, no number of absurd size, no key twice.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.numpy import load, save
from torch import Tensor

from fedgrove.escape import MAX_WORD, printable
from fedgrove.rounds import strict_json

Info = dict[str, Any]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHANGE, WEIGHT = "change/", "weight/"  # tensors of a response: what is summed, and its weight
PART_BYTES = 1024  # of a tensor's parts, at most nine, in the index of a safetensors file
INDEX_BYTES = 68  # of a part, in that index
TRIAL = 1 << 16  # bytes of a part that are compressed first; if they do not shrink, the part is not compressed


class WireError(ValueError):
    """Bytes that are not a valid message, or not the expected one; the text says what is wrong, in one line."""


def pack(tensors: Mapping[str, Tensor], info: Info) -> bytes:
    """Packs tensors and JSON into one message.

    Of a tensor ``change/x`` with a mask ``weight/x``, only the entries that the mask keeps are sent; the others must be zero.
    Any other tensor with many zeros is sent as its non-zero values and a separate mask.

    Args:
        tensors: any shapes; dtypes as in ``DTYPES``.
        info: plain JSON.
    """
    pieces: dict[str, Bytes] = {}
    rows = []
    for i, name in enumerate(sorted(tensors, key=lambda name: (tensors[name].dtype != torch.bool, name))):
        tensor = tensors[name].detach().cpu()
        rows.append({"name": name, "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)})
        values = tensor.contiguous().reshape(-1)
        if tensor.dtype == torch.bool:
            pieces[f"{i}.mask"] = _compress(_pack_mask(values))
            continue
        mask = _mask_of(name, tensors)
        if mask is not None:
            values = values[mask.cpu().reshape(-1)]
        else:
            bits = _bits(values)
            if (bits == 0).sum() * bits.element_size() > bits.numel() // 8:  # a mask is smaller than the zeros
                pieces[f"{i}.mask"] = _compress(_pack_mask(bits != 0))
                values = values[bits != 0]
        planes = _bits(values).numpy().view(np.uint8).reshape(-1, values.element_size())
        for k in range(planes.shape[1]):
            pieces[f"{i}.{k}"] = _compress(planes[:, k]) if k == 0 or planes[:, k].any() else np.zeros(0, np.uint8)
    header = json.dumps({"info": info, "tensors": rows}, separators=(",", ":"), sort_keys=True).encode()
    pieces["header"] = np.frombuffer(header, np.uint8)
    message: bytes = save({"checksum": _checksum(pieces), **pieces})
    return message


def framing(specs: Mapping[str, tuple[torch.Size, torch.dtype]]) -> int:
    """About how many bytes of a message are not values: the tensors' rows in the header, and the index of their parts.

    Args:
        specs: shape and dtype by name, of tensors without many zeros.
    """
    rows = [{"name": name, "dtype": _NAMES[dtype], "shape": list(shape)} for name, (shape, dtype) in specs.items()]
    parts = sum(dtype.itemsize for _, dtype in specs.values())
    return len(json.dumps(rows, separators=(",", ":"))) + INDEX_BYTES * parts


def unpack(message: bytes) -> tuple[dict[str, Tensor], Info]:
    """Unpacks the tensors and the JSON of a message.

    Raises:
        WireError: the bytes are damaged or do not match their header.
    """
    try:
        pieces: dict[str, Bytes] = load(message)
        if any(piece.dtype != np.uint8 or piece.ndim != 1 for piece in pieces.values()):
            raise ValueError("a part that is not bytes")
        if pieces.pop("checksum").tobytes() != _checksum(pieces).tobytes():
            raise ValueError("a wrong checksum")
        header = strict_json.loads(pieces.pop("header").tobytes())
        info, rows = header["info"], header["tensors"]
        tensors: dict[str, Tensor] = {}
        for i, row in enumerate(rows):
            name, shape = row["name"], row["shape"]
            if not isinstance(name, str) or name in tensors:
                raise ValueError("a name that is missing or used twice")
            if (
                len(shape) > 64
                or not all(type(n) is int and n >= 0 for n in shape)
                or math.prod(n or 1 for n in shape) >= 2**63
            ):
                raise ValueError("a shape that no tensor has")
            tensors[name] = _read(i, DTYPES[row["dtype"]], math.prod(shape), pieces, _mask_of(name, tensors)).view(shape)
    except (safetensors.SafetensorError, zlib.error, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise WireError(f"the message is damaged ({type(error).__name__})") from error
    if pieces or not isinstance(info, dict):
        raise WireError("the message is damaged (parts that belong to no tensor)")
    return tensors, info


def _read(i: int, dtype: torch.dtype, numel: int, pieces: dict[str, Bytes], mask: Tensor | None) -> Tensor:
    """The i-th tensor, flat; removes its parts from ``pieces``. ``mask``: the tensor ``weight/x`` of a ``change/x``, if any."""
    if mask is not None and dtype != torch.bool:
        mask = mask.reshape(-1)
    elif f"{i}.mask" in pieces or dtype == torch.bool:
        raw = _decompress(pieces.pop(f"{i}.mask"), (numel + 7) // 8)
        mask = torch.from_numpy(np.unpackbits(raw, count=numel, bitorder="little")).bool()
        if dtype == torch.bool:
            return mask
    if mask is not None and mask.numel() != numel:
        raise ValueError("a tensor of another size than its mask")
    count = numel if mask is None else int(mask.sum())
    first = _decompress(pieces.pop(f"{i}.0"), count)  # never empty, so that a short message cannot take much memory
    rest = [pieces.pop(f"{i}.{k}") for k in range(1, dtype.itemsize)]
    planes = np.stack([first, *(_decompress(piece, count) if piece.size else np.zeros_like(first) for piece in rest)], axis=1)
    values = torch.from_numpy(planes.reshape(-1)).view(dtype)
    return values if mask is None else torch.zeros(numel, dtype=dtype).masked_scatter_(mask, values)


def _mask_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The mask ``weight/x`` of a tensor ``change/x``, if there is one."""
    mask = tensors.get(name.replace(CHANGE, WEIGHT, 1)) if name.startswith(CHANGE) else None
    return mask if mask is not None and mask.dtype == torch.bool else None


def _pack_mask(mask: Tensor) -> Bytes:
    return np.packbits(mask.numpy(), bitorder="little")


def _checksum(pieces: Mapping[str, Bytes]) -> Bytes:
    crc = 0
    for name in sorted(pieces):
        crc = zlib.crc32(pieces[name].data, zlib.crc32(name.encode(), crc))
    return np.array([crc], dtype="<u4").view(np.uint8)


def _bits(values: Tensor) -> Tensor:
    """The same bytes as integers: numpy has no bfloat16, and −0.0 must not count as zero."""
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _compress(raw: Bytes) -> Bytes:
    """The bytes, compressed if that makes them shorter; the receiver can tell by the length."""
    data = np.ascontiguousarray(raw).tobytes()
    packed = data
    if len(data) <= TRIAL or len(_compressed(data[:TRIAL])) < TRIAL:  # compressing all mantissas in vain would take long
        packed = _compressed(data)
    return np.frombuffer(packed if len(packed) < len(data) else data, np.uint8)


def _compressed(data: bytes) -> bytes:
    compressor = zlib.compressobj(level=1, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(data) + compressor.flush()


def _decompress(piece: Bytes, size: int) -> Bytes:
    """The inverse of :func:`_compress`; never more than ``size`` bytes, whatever the sender wrote."""
    data = piece.tobytes()
    if len(data) < size <= 8 * len(data):
        decompressor = zlib.decompressobj(wbits=-15)
        data = decompressor.decompress(data, size + 1)
        if not decompressor.eof or decompressor.unused_data:
            raise ValueError("a part that does not end where it should")
    if len(data) != size:
        raise ValueError("a part whose size is not as declared")
    return np.frombuffer(data, np.uint8)


def check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Refuses tensors that do not match the request.

    Args:
        tensors: the received tensors.
        expected: shape and dtype by name; no name may be missing or added.

    Raises:
        WireError: names the first tensor that differs in name, shape or dtype, or that holds NaN or infinity.
    """
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise WireError(f"{name} is missing")
        if name not in expected:
            raise WireError(f"'{printable(name, MAX_WORD)}' was not requested")
        shape, dtype = expected[name]
        tensor = tensors[name]
        if tensor.shape != shape:
            raise WireError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype != dtype:
            raise WireError(f"{name} has dtype {_NAMES[tensor.dtype]}, not {_NAMES[dtype]}")
        if dtype.is_floating_point and not torch.isfinite(tensor).all():
            raise WireError(f"{name} holds NaN or infinity")


def largest(expected: Mapping[str, tuple[torch.Size, torch.dtype]]) -> int:
    """The bytes of the largest message of these tensors that can be valid.

    No part of a message is longer than what it encodes, so this is the tensors' size, a mask for each, and a margin: a
    few hundred bytes for every tensor (the names of its parts), and ``strict_json.MAX_BYTES`` for the header.
    """
    values = sum(shape.numel() * dtype.itemsize + shape.numel() // 8 for shape, dtype in expected.values())
    return values + PART_BYTES * len(expected) + strict_json.MAX_BYTES


def estimate(numel: int, sparsity: float, dtype: torch.dtype) -> int:
    """The approximate size of a pruned weight on the wire, in bytes: one bit per entry, and the compressed values.

    Trained bfloat16 weights compress to 0.63 of their size (measured on the shipped model). Other dtypes compress less, because
    their mantissas are longer and only one byte of each value compresses.
    """
    width = torch.empty((), dtype=dtype).element_size()
    return math.ceil(numel / 8 + numel * (1 - sparsity) * (width - 1 + 0.27))
