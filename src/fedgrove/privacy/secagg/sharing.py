"""Shamir's secret sharing (CACM 1979): ``threshold`` shares of a secret recover it, fewer say nothing about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import shamirs

SECRET_BYTES = 16
SHARE_BYTES = SECRET_BYTES + 1
PRIME = 2**128 + 51  # the smallest prime that is larger than every secret

Secret = Literal["mask", "self"]  # of each client two secrets are shared: the seeds of its mask key and of its self-mask


def split(secret: str, holders: Sequence[str], threshold: int) -> dict[str, str]:
    """Splits a secret among holders.

    Args:
        secret: ``SECRET_BYTES`` in hex.
        holders: the names of those who get a share; the one in place i gets the value at i + 1.
        threshold: how many shares recover the secret.

    Returns:
        By holder, ``SHARE_BYTES`` in hex.
    """
    shares = shamirs.shares(int(secret, 16), len(holders), modulus=PRIME, threshold=threshold)
    return {holder: f"{share.value:0{2 * SHARE_BYTES}x}" for holder, share in zip(holders, shares, strict=True)}


def recover(shares: Mapping[int, str]) -> str:
    """The secret in hex, from exactly ``threshold`` shares: a holder's place in ``holders`` and its share.

    Wrong shares give a wrong secret, not an error.
    """
    secret = at_zero({place + 1: int(share, 16) for place, share in shares.items()})
    return f"{secret % 2 ** (8 * SECRET_BYTES):0{2 * SECRET_BYTES}x}"


def at_zero(points: Mapping[int, int]) -> int:
    """Lagrange's interpolation at 0 modulo ``PRIME`` of {x: f(x)}.

    ``shamirs.interpolate`` gives the same with one modular inversion for each pair of points; one for each point, as here, is a
    hundred times faster with a hundred clients.
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
