"""Amounts of memory, as plans and complaints say them."""

from __future__ import annotations

import math


def mebibytes(number: float, enough: bool = False) -> str:
    """Bytes as whole MiB: "1,024 MiB". ``enough`` rounds up: what is said to be needed must do."""
    amount = number / 2**20
    return f"{math.ceil(amount) if enough else amount:,.0f} MiB"
