"""Tensors to bytes and back: a mask costs one bit, zeros cost nothing more, values travel in compressed byte planes.

The same code packs the answers of clients and the file of a packed model. A packed message is a safetensors file: a
``header`` (JSON) and, for the i-th tensor, ``i.mask`` (its bits) and ``i.0``, ``i.1``, … (the first, second, … byte of every
value). The bytes of trained weights differ: sign and exponent repeat and shrink to a third, mantissas do not. Kept apart,
the former compress (zlib, Huffman codes alone, which is both the fastest setting and, on such bytes, the smallest).

On arrival nothing is believed before it is checked: sizes are known from shapes before anything is inflated.
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

Info = dict[str, Any]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHANGE, WEIGHT = "change/", "weight/"


class WireError(ValueError):
    """Bytes that are not a message, or not the one that was promised. The message says what is wrong, in one line."""


def pack(tensors: Mapping[str, Tensor], info: Info) -> bytes:
    """One message.

    A tensor ``change/x`` that travels with a mask ``weight/x`` is sent on the mask's kept entries only; it must be zero
    elsewhere. Any other tensor with many zeros is sent as its non-zeros and a mask of its own.

    Args:
        tensors: any shapes; dtypes as in ``DTYPES``.
        info: plain JSON.
    """
    pieces: dict[str, Bytes] = {}
    rows = []
    for i, name in enumerate(sorted(tensors, key=lambda name: (tensors[name].dtype != torch.bool, name))):
        tensor = tensors[name]
        row: Info = {"name": name, "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        tensor = tensor.detach().cpu().contiguous()
        mask = None
        if tensor.dtype == torch.bool:
            values = None
            mask = tensor.reshape(-1)
        else:
            values = tensor.reshape(-1)
            under = name.replace(CHANGE, WEIGHT, 1)
            if name.startswith(CHANGE) and under in tensors and tensors[under].dtype == torch.bool:
                row["under"] = under
                values = values[tensors[under].cpu().reshape(-1)]
            else:
                bits = _bits(values)
                if (bits == 0).sum() * bits.element_size() > bits.numel() // 8:  # the mask costs less than the zeros
                    mask = bits != 0
                    values = values[mask]
        if mask is not None:
            row["mask"] = True
            pieces[f"{i}.mask"] = _squeeze(np.packbits(mask.numpy(), bitorder="little"), row)
        if values is not None:
            row["count"] = values.numel()
            planes = _bits(values).numpy().view(np.uint8).reshape(-1, values.element_size())
            for k in range(planes.shape[1]):
                pieces[f"{i}.{k}"] = _squeeze(planes[:, k], row)
        rows.append(row)
    header = json.dumps({"info": info, "tensors": rows}, separators=(",", ":"), sort_keys=True).encode()
    message: bytes = save({"header": np.frombuffer(header, np.uint8), **pieces})
    return message


def unpack(message: bytes) -> tuple[dict[str, Tensor], Info]:
    """The tensors and the JSON of a message.

    Raises:
        WireError: the bytes are damaged or do not fit what their header says.
    """
    try:
        pieces = load(message)
        header = json.loads(pieces.pop("header").tobytes())
        info, rows = header["info"], header["tensors"]
        tensors: dict[str, Tensor] = {}
        for i, row in enumerate(rows):
            tensors[row["name"]] = _read(i, row, pieces, tensors)
    except (safetensors.SafetensorError, zlib.error, ValueError, KeyError, TypeError, RuntimeError, IndexError) as fault:
        raise WireError(f"the message is damaged ({type(fault).__name__})") from fault
    if pieces or not isinstance(info, dict):
        raise WireError("the message is damaged (parts that no tensor owns)")
    return tensors, info


def _read(i: int, row: Info, pieces: dict[str, Bytes], tensors: dict[str, Tensor]) -> Tensor:
    dtype = DTYPES[row["dtype"]]
    shape = [int(n) for n in row["shape"]]
    numel = math.prod(shape)
    squeezed = iter(row["squeezed"])
    mask = None
    if row.get("under"):
        mask = tensors[row["under"]].reshape(-1)
    elif row.get("mask"):
        raw = _swell(pieces.pop(f"{i}.mask"), next(squeezed), (numel + 7) // 8)
        mask = torch.from_numpy(np.unpackbits(raw, count=numel, bitorder="little")).bool()
    if dtype == torch.bool:
        if mask is None or mask.numel() != numel:
            raise ValueError("a mask without bits")
        return mask.view(shape)
    count = numel if mask is None else int(mask.sum())
    width = torch.empty((), dtype=dtype).element_size()
    if row["count"] != count or (mask is not None and mask.numel() != numel):
        raise ValueError("a tensor of another size than its mask")
    planes = np.empty((count, width), np.uint8)
    for k in range(width):
        planes[:, k] = _swell(pieces.pop(f"{i}.{k}"), next(squeezed), count)
    values = torch.from_numpy(planes.reshape(-1)).view(dtype)
    if mask is None:
        return values.view(shape)
    return torch.zeros(numel, dtype=dtype).masked_scatter_(mask, values).view(shape)


def _bits(values: Tensor) -> Tensor:
    """The same bytes as whole numbers: numpy knows no bfloat16, and −0.0 must not pass for zero."""
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _squeeze(raw: Bytes, row: Info) -> Bytes:
    """The bytes compressed where that helps, else as they are; the row notes which."""
    data = np.ascontiguousarray(raw).tobytes()
    shrink = zlib.compressobj(level=1, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    packed = shrink.compress(data) + shrink.flush()
    helps = len(packed) < len(data)
    row.setdefault("squeezed", []).append(helps)
    return np.frombuffer(packed if helps else data, np.uint8)


def _swell(piece: Bytes, squeezed: bool, size: int) -> Bytes:
    """The bytes of :func:`_squeeze`; never more than ``size`` of them, whatever the sender wrote."""
    data = piece.tobytes()
    if squeezed:
        data = zlib.decompressobj(wbits=-15).decompress(data, size + 1)
    if len(data) != size:
        raise ValueError("a part of another size than promised")
    return np.frombuffer(data, np.uint8)


def check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Refuses an answer that is not what was asked for.

    Args:
        tensors: what came.
        expected: for each name its shape and dtype; no name may be missing or added.

    Raises:
        WireError: names the first tensor that differs in name, shape or dtype, or that holds NaN or infinity.
    """
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise WireError(f"{name} is missing")
        if name not in expected:
            raise WireError(f"{name} was not asked for")
        shape, dtype = expected[name]
        tensor = tensors[name]
        if tensor.shape != shape:
            raise WireError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype != dtype:
            raise WireError(f"{name} has dtype {_NAMES[tensor.dtype]}, not {_NAMES[dtype]}")
        if dtype.is_floating_point and not torch.isfinite(tensor).all():
            raise WireError(f"{name} holds NaN or infinity")


def estimate(numel: int, sparsity: float, dtype: torch.dtype) -> int:
    """About how many bytes a pruned weight takes on the wire: a bit each, and what compression leaves of the values.

    Trained bfloat16 weights keep 0.63 of their bytes (measured on the shipped model; other dtypes keep more, for their
    mantissas are longer: only one byte of each value compresses).
    """
    width = torch.empty((), dtype=dtype).element_size()
    return math.ceil(numel / 8 + numel * (1 - sparsity) * (width - 1 + 0.27))
