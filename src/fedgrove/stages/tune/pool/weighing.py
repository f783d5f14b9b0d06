"""What each owner has changed in all rounds so far, of which every member of gate "user_centric" is a weighted sum."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedgrove.models.tensor_files import save_tensors
from fedgrove.stages.tune.float_round import limit_of
from fedgrove.stages.tune.gates import change_gate_of
from fedgrove.stages.tune.parametrizations import Mixable
from fedgrove.stages.tune.pool.members import Member, mixture
from fedgrove.stages.tune.received import by_linear


@dataclass
class Changes:
    """What each owner has changed in all rounds so far.

    Attributes:
        method: the module of the parametrization.
        sums: by owner and linear.
        squares: by owner, the squared norms of its changes of single rounds, summed.
        rounds: by owner, how many rounds it was in.
    """

    method: Mixable
    sums: list[Member]
    squares: list[float]
    rounds: list[int]

    @classmethod
    def none(cls, method: Mixable, owners: int) -> Changes:
        """Before the first round."""
        return cls(method, [{} for _ in range(owners)], [0.0] * owners, [0] * owners)

    def add(self, members: Mapping[int, tuple[Member, Member]], max_change: float) -> list[int]:
        """Adds what owners changed in a round; returns those whose change was scaled down.

        Args:
            members: by owner, before and after the round.
            max_change: see :func:`fedgrove.stages.tune.float_round.limit_of`.
        """
        changes = {owner: mixture(self.method, [after, before], [1.0, -1.0]) for owner, (before, after) in members.items()}
        norms = {owner: math.sqrt(float(self._products([change]))) for owner, change in changes.items()}
        limit = limit_of(norms.values(), max_change)
        for owner, change in changes.items():
            scale = min(1.0, limit / norms[owner]) if norms[owner] else 1.0
            self.sums[owner] = mixture(self.method, [self.sums[owner], change], [1.0, scale])
            self.squares[owner] += (scale * norms[owner]) ** 2
            self.rounds[owner] += 1
        return [owner for owner, norm in norms.items() if norm > limit]

    def weights(self, gate: str, windows: Mapping[str, Sequence[int]]) -> list[list[float]]:
        """By owner, how much of each owner's mean change it gets.

        Args:
            gate: its name.
            windows: by client, how many each member gets.
        """
        of_member = torch.tensor([sum(column) for column in zip(*windows.values(), strict=True)], dtype=torch.float64)
        squares, rounds = torch.tensor(self.squares, dtype=torch.float64), torch.tensor(self.rounds)
        found: list[list[float]] = change_gate_of(gate).weights(self._products(self.sums), squares, rounds, of_member).tolist()
        return found

    def weighted(self, weights: Sequence[float], rounds: int) -> Member:
        """Σ weight · mean change of a round, for so many rounds."""
        scales = [weight * rounds / max(1, own) for weight, own in zip(weights, self.rounds, strict=True)]
        return mixture(self.method, self.sums, scales)

    def _products(self, members: Sequence[Member]) -> Tensor:
        """Inner products of what is trained, (members, members) float64; what all have in common does not count."""
        total = torch.zeros(len(members), len(members), dtype=torch.float64)
        each = [self._trained(member) for member in members]
        for key in sorted({key for of in each for key in of}):
            none = torch.zeros_like(next(of[key] for of in each if key in of))
            rows = torch.stack([of.get(key, none) for of in each])
            total += rows @ rows.T
        return total

    def _trained(self, member: Member) -> dict[tuple[str, str], Tensor]:
        """By linear and part, (numbers,) float64."""
        return {
            (name, part): value.double().flatten()
            for name, change in member.items()
            for part, value in change.parts().items()
            if part not in self.method.IN_COMMON
        }

    def write(self, file: Path) -> None:
        """Writes one safetensors file, atomically."""
        tensors = {
            f"{owner}/{name}/{part}": value.contiguous()
            for owner, member in enumerate(self.sums)
            for name, change in member.items()
            for part, value in change.parts().items()
        }
        save_tensors(tensors, file, {"facts": json.dumps({"squares": self.squares, "rounds": self.rounds})})

    @classmethod
    def read(cls, method: Mixable, file: Path) -> Changes:
        """Reads what :meth:`write` wrote."""
        with safe_open(file, framework="pt") as opened:
            facts = json.loads(opened.metadata()["facts"])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        sums = list[Member]()
        for owner in range(len(facts["rounds"])):
            of = by_linear(tensors, str(owner))
            sums.append({name: method.change_of(parts) for name, parts in of.items()})
        return cls(method, sums, facts["squares"], facts["rounds"])
