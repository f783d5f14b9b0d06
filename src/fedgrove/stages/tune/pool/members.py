"""The members of a pool and their mixtures. All have the same A, so a weighted sum of members is one adapter of their rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.tune.factors import Factors

Member = Mapping[str, Factors]  # by linear; without linears that it does not change


def mixture(members: Sequence[Member], weights: Sequence[float]) -> dict[str, Factors]:
    """Σ weight·member, exactly: (Σ weight·B)·A.

    Raises:
        ValueError: two members have not the same A of a linear.
    """
    mixed: dict[str, Factors] = {}
    for member, weight in zip(members, weights, strict=True):
        for name, factors in member.items():
            if not weight or not factors.rank:
                continue
            before = mixed.get(name)
            if before is not None and not torch.equal(before.a, factors.a):
                raise ValueError(f"{name}: the members have not one A")
            mixed[name] = Factors(factors.b * weight if before is None else before.b + factors.b * weight, factors.a)
    return mixed


def write_members(folder: Path, members: Sequence[Member]) -> None:
    """Writes ``a.safetensors`` and for each member ``member-K.safetensors`` with its B, float32, by linear."""
    shared: dict[str, Tensor] = {}
    for number, member in enumerate(members):
        shared |= {name: factors.a.float().contiguous() for name, factors in member.items()}
        save_tensors(
            {name: factors.b.float().contiguous() for name, factors in member.items()}, folder / f"member-{number}.safetensors"
        )
    save_tensors(shared, folder / "a.safetensors")


def read_members(folder: Path, number: int) -> list[dict[str, Factors]]:
    """Reads what :func:`write_members` wrote."""
    shared = load_file(folder / "a.safetensors")
    files = [load_file(folder / f"member-{member}.safetensors") for member in range(number)]
    return [{name: Factors(b, shared[name]) for name, b in file.items()} for file in files]
