"""Full fine-tuning: all weights of every linear are trained, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.cost import ModelCost
from fedgrove.quantities import mebibytes
from fedgrove.rounds.request import Disclosure, TensorSpecs
from fedgrove.stages.tune import cost as costs
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.changes import Start, State
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.parametrizations import Attachment
from fedgrove.stages.tune.parametrizations.lora import merge_dense
from fedgrove.stages.tune.training import GradientMasks

if TYPE_CHECKING:  # the stage's table names its parametrization, so it imports this package
    from fedgrove.stages.tune.config import Config

FORM: Form = "tensors"
LOOP = "changes"
DISCLOSES = Disclosure.CHANGES
AGGREGATION = "fedavg"
TRAINERS = ("sgd", "dp_sgd")
DEFAULTS: Mapping[str, Any] = {}
KEYS: frozenset[str] = frozenset()
UNUSED: frozenset[str] = frozenset()
RANKED = False
RELATIVE = True
PRIVATE = False
PERSONAL = False
FROZEN = False
BY_WINDOWS = False
ALONE = True
SUMS_LOSS = True
CLIPPED = ("change", "gradient")


@dataclass(frozen=True)
class Dense:
    """A change of a weight as one tensor.

    Attributes:
        value: (out, in) float32; None: no change, without memory for zeros.
    """

    value: Tensor | None = None

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Dense:
        return cls(parts.get("weight"))

    def parts(self) -> dict[str, Tensor]:
        return {} if self.value is None else {"weight": self.value}

    def plus(self, *others: Dense) -> Dense:
        total = self.value
        for other in others:
            if other.value is not None:
                total = (other.value if total is None else total + other.value).float()
        return Dense(total)

    def scaled(self, scale: float) -> Dense:
        return Dense(None if self.value is None else self.value * scale)

    def compress(self, rank: int | None = None) -> Dense:
        return self

    def norm(self) -> float:
        return 0.0 if self.value is None else float(self.value.double().norm())

    def largest_norm(self) -> float:
        return self.norm()

    def squared_norm(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64) if self.value is None else self.value.double().square().sum()

    def numel(self) -> int:
        return 1 if self.value is None else self.value.numel()


def none(shape: tuple[int, int]) -> Dense:
    """No change."""
    return Dense()


def change_of(parts: Mapping[str, Tensor]) -> Dense:
    """From its tensors."""
    return Dense.of(parts)


def start(
    own: Mapping[str, Tensor], rest: Mapping[str, Tensor], shape: tuple[int, int], rank: int, name: str, seed: str
) -> Start[Dense]:
    """The change so far."""
    return Start(Dense.of(own), Dense())


def attach(model: nn.Module, starts: Mapping[str, Start[Dense]], how: Attachment) -> GradientMasks:
    """Adds the change so far to the weights and makes them trainable; gradients of pruned weights are masked."""
    masks = []
    for name, begun in starts.items():
        module = model.get_submodule(name)
        weight = cast(nn.Parameter, module.weight)
        if begun.own.value is not None:
            weight.data += as_matrix(module, begun.own.value).to(weight.device, weight.dtype)
        module.register_buffer("begun", weight.detach().clone(), persistent=False)
        weight.requires_grad_()
        if name in how.masks:
            masks.append((weight, as_matrix(module, how.masks[name]).to(weight.device)))
    return masks


def detach(model: nn.Module, names: Sequence[str], starts: Mapping[str, Start[Dense]]) -> dict[str, Dense]:
    """The difference that this round made to each weight, (out, in) float32."""
    with torch.no_grad():
        return {name: Dense(cast(Tensor, live(model, name, starts[name]).value).cpu().contiguous()) for name in names}


def live(model: nn.Module, name: str, start: Start[Dense]) -> Dense:
    """The weight as it is now, minus what it was."""
    module = cast(Any, model.get_submodule(name))
    return Dense(as_matrix(module, module.weight - module.begun))


def received(parts: Mapping[str, Tensor], own: Dense, rank: int, name: str, seed: str) -> Dense:
    """The difference that the round made."""
    return Dense.of(parts)


def total(trained: Dense, start: Start[Dense]) -> Dense:
    """The change so far plus the difference that this round made."""
    return start.own.plus(trained)


def round_change(trained: Dense, start: Start[Dense], shared_a: bool) -> dict[str, Tensor]:
    """The trained change: it already is the difference that the round made."""
    return trained.parts()


def after_round(
    state: State[Dense], change: Mapping[str, Tensor], rank: int, dtype: torch.dtype, name: str, seed: str
) -> Dense:
    """The state plus the mean difference."""
    return state.live.plus(Dense.of(change))


def expected(shape: tuple[int, int], rank: int, dtype: torch.dtype, shared_a: bool) -> TensorSpecs:
    """One tensor, (out, in)."""
    return {"weight": (torch.Size(shape), dtype)}


def merge(weight: Tensor, change: Dense, masked: bool) -> Tensor:
    """weight + change."""
    return weight if change.value is None else merge_dense(weight, change.value, masked)


def configurations(space: SearchSpace, cost: ModelCost, batch: int) -> list[ClientConfig]:
    """A single configuration: trained weights are always float32."""
    return [ClientConfig(32, batch, 1, dict.fromkeys(cost.linears, 1))]


def memory(cost: ModelCost, space: SearchSpace, config: ClientConfig) -> float:
    """See :func:`fedgrove.stages.tune.cost.full_memory`."""
    return costs.full_memory(cost, config.micro)


def compute_seconds(cost: ModelCost, space: SearchSpace, budget: Budget, config: ClientConfig) -> float:
    """See :func:`fedgrove.stages.tune.cost.full_compute_seconds`."""
    return costs.full_compute_seconds(cost, space, budget, config.batch)


def numbers(cost: ModelCost, ranks: Mapping[str, int], config: Config, sent: bool) -> int:
    """out·in for each linear."""
    return sum(rows * columns for name, (rows, columns) in cost.linears.items() if name in ranks)


def shortage(cost: ModelCost, space: SearchSpace, budget: Budget) -> str:
    """Even a micro-batch of one window needs too much memory."""
    return (
        f"full fine-tuning needs {mebibytes(costs.full_memory(cost, 1), enough=True)} "
        f'of memory, but it has {mebibytes(budget.memory)} (clients.memory); lower length, or set method = "lora"'
    )


def write_adapter(
    out: Path, decoder: Decoder, changes: Mapping[str, Any], base: str, title: str, pruned: bool, changed: bool
) -> bool:
    """Writes nothing: a dense change of all weights cannot be stored as an adapter."""
    return False
