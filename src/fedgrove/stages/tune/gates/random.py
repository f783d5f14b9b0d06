"""Owners are dealt to the members by the seed, as evenly as possible: the control of any gate that looks at something."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedgrove.stages.tune.gates import Looks

if TYPE_CHECKING:
    from fedgrove.stages.tune.pool.config import Pool

LOOKS: Looks = "job"
OF_CLIENTS = True
CHOOSES = False
KEYS = frozenset({"common"})


def deal(pool: Pool, clients: Sequence[str], seed: str) -> dict[str, int]:
    """The clients in an order that depends on the seed, one after the other to the members."""
    order = sorted(clients)
    random.Random(f"{seed}/gate").shuffle(order)
    return {client: place % pool.most for place, client in enumerate(order)}
