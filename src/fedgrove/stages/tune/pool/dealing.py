"""Which member of a pool each of a client's windows goes to, and how many steps it trains each member."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.models.tensor_files import save_tensors

MEMBERS = "members"
LEAST = 0.1  # of the windows of a client's largest member: with fewer, it would hardly move a member, and yet count


def draw_members(weights: Tensor, seed: str) -> Tensor:
    """A member for each window, drawn from its weights: (windows, members) -> (windows,) int64.

    So a window needs one step of one member, and in the mean over draws each member gets its weight of it.

    Args:
        seed: the stage's, with the client's name.
    """
    digest = hashlib.sha256(f"{seed}/deal".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    drawn = torch.rand(len(weights), 1, generator=generator, dtype=torch.float64)
    return (weights.cumsum(1)[:, :-1] <= drawn).sum(1)


def divide(steps: int, windows: Sequence[int]) -> tuple[int, ...]:
    """A round's steps divided among members as their windows are (largest remainders; the first of equal ones).

    >>> divide(8, [30, 10, 0])
    (6, 2, 0)
    """
    total = sum(windows)
    parts = [steps * number // total for number in windows]
    order = sorted(range(len(windows)), key=lambda member: (-(steps * windows[member] % total), member))
    for member in order[: steps - sum(parts)]:
        parts[member] += 1
    return tuple(parts)


def steps_of(steps: int, windows: Sequence[int]) -> tuple[int, ...]:
    """A client's steps of a round for each member; none for those that have few of its windows beside the one that has most.

    >>> steps_of(8, [30, 10, 2])
    (6, 2, 0)
    """
    return divide(steps, [number if number >= LEAST * max(windows) else 0 for number in windows])


def keep_deal(client: LocalClient, stage: int, members: Tensor) -> None:
    """Stores the member of each window on the client's own disk."""
    save_tensors({MEMBERS: members.contiguous()}, client.folder / f"deal-{stage}.safetensors")


def members_of(client: LocalClient, stage: int, windows: int) -> Tensor:
    """The member of each of so many windows: (windows,) int64.

    Raises:
        FedgroveError: the client has not dealt its windows, or others.
    """
    file = client.folder / f"deal-{stage}.safetensors"
    dealt: Tensor | None = load_file(file)[MEMBERS] if file.is_file() else None
    if dealt is None or len(dealt) != windows:
        raise client.error("its working files are gone; continue the run with --resume")
    return dealt
