"""Shamir's secret sharing (CACM 1979): ``threshold`` shares recover a secret, fewer reveal nothing about it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

import shamirs

SECRET_BYTES = 16
SHARE_BYTES = SECRET_BYTES + 1
PRIME = 2**128 + 51  # the smallest prime that is larger than every secret
MAX_TRIES = 1000  # sets of shares, where some are wrong: a fraction of a second

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
    secret = interpolate(_points(shares))
    return f"{secret % 2 ** (8 * SECRET_BYTES):0{2 * SECRET_BYTES}x}"


def find_secret(
    shares: Mapping[int, str], threshold: int, fits: Callable[[str], bool], suspects: Collection[int] = ()
) -> tuple[str, list[int]] | None:
    """The secret in hex, although some shares may be wrong: tries up to ``MAX_TRIES`` sets of ``threshold`` shares.

    Args:
        shares: as for :func:`recover`, at least ``threshold``.
        fits: whether a recovered secret is the right one.
        suspects: indices of shares that are probably wrong; they are tried last.

    Returns:
        The secret, and the indices of the shares that are wrong, sorted; empty without a search, if the first shares
        gave the secret. None: no set that was tried gave it.
    """
    order = sorted(shares, key=lambda place: (place in suspects, place))
    for tried, chosen in enumerate(_sets(order, threshold)):
        known = {place: shares[place] for place in chosen}
        secret = recover(known)
        if fits(secret):
            points = _points(known)
            others = [] if tried == 0 else sorted(set(shares) - set(chosen))
            return secret, [place for place in others if interpolate(points, place + 1) != int(shares[place], 16) % PRIME]
    return None


def _sets(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Sets of ``size`` elements: first the first ones; then all, if they are at most ``MAX_TRIES``, else random ones."""
    yield order[:size]
    if math.comb(len(order), size) <= MAX_TRIES:
        yield from itertools.combinations(order, size)
    else:
        draw = random.SystemRandom()  # so that nobody can choose which wrong shares are found
        yield from (draw.sample(order, size) for _ in range(MAX_TRIES))


def _points(shares: Mapping[int, str]) -> dict[int, int]:
    return {place + 1: int(share, 16) for place, share in shares.items()}


def interpolate(points: Mapping[int, int], at: int = 0) -> int:
    """Lagrange interpolation of {x: f(x)} at a point that is none of these, modulo ``PRIME``.

    ``shamirs.interpolate`` gives the same result with one modular inversion per pair of points. This function needs one
    per point, which is a hundred times faster with a hundred clients.
    """
    total = 0
    for i, value in points.items():
        above, below = value, 1
        for j in points:
            if j != i:
                above = above * (j - at) % PRIME
                below = below * (j - i) % PRIME
        total += above * pow(below, -1, PRIME)
    return total % PRIME
