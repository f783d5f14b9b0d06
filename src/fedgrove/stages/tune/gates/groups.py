"""Owners say which group they belong to, and each group has a member: what any gate that finds groups is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedgrove.stages.tune.gates import Looks

if TYPE_CHECKING:
    from fedgrove.stages.tune.pool.config import Pool

LOOKS: Looks = "job"
OF_CLIENTS = True
CHOOSES = False
KEYS = frozenset({"common", "groups"})


def deal(pool: Pool, clients: Sequence[str], seed: str) -> dict[str, int]:
    """Each client's group, in the order of their names; ``members`` is their number."""
    if not pool.groups:
        raise ValueError('groups: say who belongs together, such as { wards = ["ash", "birch"], labs = ["cedar", "elm"] }')
    if pool.members != len(pool.groups):
        raise ValueError(f"members: {pool.members}, but there are {len(pool.groups)} groups; leave members out")
    dealt: dict[str, int] = {}
    for member, group in enumerate(sorted(pool.groups)):
        for client in pool.groups[group]:
            if client not in clients:
                raise ValueError(f"groups.{group}: '{client}' is no client of the job; remove it")
            if client in dealt:
                raise ValueError(f"groups.{group}: client '{client}' is in a group already; remove it from one")
            dealt[client] = member
    missing = sorted(set(clients) - set(dealt))
    if missing:
        raise ValueError(f"groups: client '{missing[0]}' is in no group; add it to one")
    return dealt
