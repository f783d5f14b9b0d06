"""Rings and keystreams: integers that wrap around, and the pseudorandom numbers that mask them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

from fedgrove.privacy.secagg.session import SecureError, Session

Ring = np.ndarray[Any, Any]  # (numel,) uint8, uint32 or uint64

RINGS = {torch.uint8: np.uint8, torch.int32: np.uint32, torch.int64: np.uint64}
CHUNK_BYTES = 2**17  # of keystream generated at once: fits into a core's cache


def as_rings(tensors: Mapping[str, Tensor]) -> list[Ring]:
    """Views of the tensors, in the order of their names, as unsigned integers that wrap around.

    Args:
        tensors: contiguous, on the CPU, of the dtypes in ``RINGS``.

    Raises:
        SecureError: a tensor has another dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in RINGS:
            raise SecureError(f"secure aggregation: {name} is {tensor.dtype}; only integers can be summed")
    return [tensors[name].reshape(-1).numpy().view(RINGS[tensors[name].dtype]) for name in sorted(tensors)]


def add_keystream(rings: list[Ring], key: bytes, sign: int) -> None:
    """Adds (+1) or subtracts (−1) the ChaCha20 keystream of a 32-byte key, in place; each ring has its own nonce."""
    zeros, stream = bytes(CHUNK_BYTES), bytearray(CHUNK_BYTES + 64)  # update_into needs space for one more block
    combine = np.add if sign > 0 else np.subtract
    for number, ring in enumerate(rings):
        encryptor = Cipher(ChaCha20(key, bytes(8) + number.to_bytes(8, "little")), mode=None).encryptor()
        step = CHUNK_BYTES // ring.itemsize
        for at in range(0, ring.size, step):
            part = ring[at : at + step]
            encryptor.update_into(zeros[: part.nbytes] if part.nbytes < CHUNK_BYTES else zeros, stream)
            combine(part, np.frombuffer(stream, part.dtype, part.size), out=part)


def pair_sign(client: str, peer: str) -> int:
    """Whether a client adds (+1) or subtracts (−1) the pairwise mask with a peer; the peer does the opposite."""
    return 1 if client < peer else -1


def reduce(rings: list[Ring], session: Session) -> None:
    """Reduces the numbers modulo the size of their ring, in place."""
    for ring in rings:
        ring &= ring.dtype.type(2 ** session.ring_bits(ring.itemsize) - 1)


def restore_signs(rings: list[Ring], session: Session) -> None:
    """Reads the highest bit of the session's ring as the sign of an int64, in place. The rings of the other
    dtypes have as many bits as the dtype, or hold no negative numbers."""
    for ring in rings:
        if ring.itemsize == 8:
            ring <<= np.uint64(64 - session.bits)
            signed = ring.view(np.int64)
            signed >>= np.int64(64 - session.bits)
