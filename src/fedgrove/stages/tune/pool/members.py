"""The members of a pool and their mixtures. A weighted sum of members is one change of the same form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.tune.parametrizations import Mixable
from fedgrove.stages.tune.received import by_linear

Member = Mapping[str, Any]  # by linear, its change; without linears that it does not change
COMMON = "common.safetensors"  # what all members have in common, such as the A of LoRA


def mixture(method: Mixable, members: Sequence[Member], weights: Sequence[float]) -> dict[str, Any]:
    """Σ weight·member, exactly.

    Raises:
        ValueError: two members have not the same A of a linear.
    """
    parts: dict[str, list[tuple[Any, float]]] = {}
    for member, weight in zip(members, weights, strict=True):
        for name, change in member.items():
            if weight and any(part.numel() for part in change.parts().values()):
                parts.setdefault(name, []).append((change, weight))
    mixed = {}
    for name, of_name in parts.items():
        try:
            mixed[name] = method.mixture(*zip(*of_name, strict=True))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return mixed


def write_members(method: Mixable, folder: Path, members: Sequence[Member]) -> None:
    """Writes for each member ``member-K.safetensors``, float32, ``<linear>/<part>``; the parts in common once, beside them."""
    common: dict[str, Tensor] = {}
    for number, member in enumerate(members):
        own: dict[str, Tensor] = {}
        for name, change in member.items():
            for part, value in change.parts().items():
                (common if part in method.IN_COMMON else own)[f"{name}/{part}"] = value.float().contiguous()
        save_tensors(own, folder / f"member-{number}.safetensors")
    if common:
        save_tensors(common, folder / COMMON)


def read_members(method: Mixable, folder: Path, number: int) -> list[dict[str, Any]]:
    """Reads what :func:`write_members` wrote."""
    common = by_linear(load_file(folder / COMMON)) if method.IN_COMMON else {}
    members = [by_linear(load_file(folder / f"member-{member}.safetensors")) for member in range(number)]
    return [{name: method.change_of({**common.get(name, {}), **parts}) for name, parts in one.items()} for one in members]
