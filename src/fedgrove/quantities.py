"""Amounts of memory as text, for plans and error messages."""

from __future__ import annotations

import math


def mebibytes(number: float, enough: bool = False) -> str:
    """Bytes in MiB, such as "1,024 MiB". ``enough`` rounds up, for an amount that must be sufficient."""
    amount = number / 2**20
    return f"{math.ceil(amount) if enough else amount:,.0f} MiB"
