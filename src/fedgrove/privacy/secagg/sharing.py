"""Shamir's secret sharing (CACM 1979): ``threshold`` shares recover a secret, fewer reveal nothing about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import shamirs

SECRET_BYTES = 16
SHARE_BYTES = SECRET_BYTES + 1
PRIME = 2**128 + 51  # the smallest prime that is larger than every secret

Secret = Literal["mask", "self"]  # each client shares two secrets: the seeds of its mask key and of its self-mask


def split(secret: str, holders: Sequence[str], threshold: int) -> dict[str, str]:
    """Splits a secret among holders.

    Args:
        secret: ``SECRET_BYTES`` in hex.
        holders: the names of the clients that get a share; the i-th, from 0, gets the value of the polynomial at i + 1.
        threshold: how many shares recover the secret.

    Returns:
        By holder, ``SHARE_BYTES`` in hex.
    """
    shares = shamirs.shares(int(secret, 16), len(holders), modulus=PRIME, threshold=threshold)
    return {holder: f"{share.value:0{2 * SHARE_BYTES}x}" for holder, share in zip(holders, shares, strict=True)}


def recover(shares: Mapping[int, str]) -> str:
    """The secret in hex, from exactly ``threshold`` shares by index of the holder in ``holders`` (see :func:`split`).

    Wrong shares give a wrong secret, not an error.
    """
    secret = at_zero({place + 1: int(share, 16) for place, share in shares.items()})
    return f"{secret % 2 ** (8 * SECRET_BYTES):0{2 * SECRET_BYTES}x}"


def at_zero(points: Mapping[int, int]) -> int:
    """Lagrange interpolation of {x: f(x)} at 0, modulo ``PRIME``.

    ``shamirs.interpolate`` gives the same result with one modular inversion per pair of points. This function needs one
    per point, which is a hundred times faster with a hundred clients.
    """
    secret = 0
    for i, value in points.items():
        above, below = value, 1
        for j in points:
            if j != i:
                above = above * j % PRIME
                below = below * (j - i) % PRIME
        secret += above * pow(below, -1, PRIME)
    return secret % PRIME
