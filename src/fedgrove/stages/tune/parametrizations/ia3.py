"""(IA)³ (Liu et al., NeurIPS 2022): one learnt scale for each output channel of a linear.

The paper's: scales that begin at one, on what a linear puts out. Ours: on every linear of a block, not on keys, values and the
feed-forward part alone; stored as the difference from one, so that changes of several clients add up; and on W·x without the
bias, so that it merges exactly: the new weight is diag(1 + s)·W. A pruned model keeps its zeros, for a scaled zero is zero.

Do not expect what LoRA learns: there are as many numbers as channels, and they can only make a channel louder or quieter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import ModelCost
from fedgrove.quantities import mebibytes
from fedgrove.rounds.request import Disclosure, TensorSpecs
from fedgrove.stages.tune import cost as costs
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.changes import Start, State
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.parametrizations import Attachment
from fedgrove.stages.tune.training import GradientMasks

FORM: Form = "tensors"
DISCLOSES = Disclosure.SCALES
AGGREGATION = "fedavg"
RANKED = False
RELATIVE = True
PRIVATE = True
PERSONAL = False


@dataclass(frozen=True)
class Scales:
    """ΔW = diag(s)·W.

    Attributes:
        s: (out,): by how much more than one each output channel is multiplied; None: by one, and nothing is sent.
    """

    s: Tensor | None = None

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Scales:
        return cls(parts.get("s"))

    def parts(self) -> dict[str, Tensor]:
        return {} if self.s is None else {"s": self.s}

    def plus(self, *others: Scales) -> Scales:
        total = self.s
        for other in others:
            if other.s is not None:
                total = other.s.double() if total is None else total.double() + other.s.double()
        return Scales(total)

    def scaled(self, scale: float) -> Scales:
        return Scales(None if self.s is None else self.s * scale)

    def compress(self, rank: int | None = None) -> Scales:
        return self

    def norm(self) -> float:
        return 0.0 if self.s is None else float(self.s.double().norm())

    def numel(self) -> int:
        return 1 if self.s is None else self.s.numel()


def none(shape: tuple[int, int]) -> Scales:
    """All scales one."""
    return Scales()


def change_of(parts: Mapping[str, Tensor]) -> Scales:
    """From its tensors."""
    return Scales.of(parts)


def start(
    own: Mapping[str, Tensor], rest: Mapping[str, Tensor], shape: tuple[int, int], rank: int, name: str, seed: str
) -> Start[Scales]:
    """The scales so far."""
    return Start(Scales(own["s"].float() if own else torch.zeros(shape[0])), none(shape))


def attach(model: nn.Module, starts: Mapping[str, Start[Scales]], how: Attachment) -> GradientMasks:
    """Multiplies what each linear puts out; no gradient needs a mask, for a scaled zero is zero."""
    for name, begun in starts.items():
        module = model.get_submodule(name)
        device = next(module.parameters()).device
        module.register_parameter("ia3_s", nn.Parameter(cast(Tensor, begun.own.s).clone().to(device)))
        module.register_forward_hook(_scale)
    return ()


def _scale(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    bias = cast(Tensor | None, getattr(module, "bias", None))
    product = output if bias is None else output - bias
    return output + (product * cast(Tensor, module.ia3_s)).to(output.dtype)


def detach(model: nn.Module, names: Sequence[str], starts: Mapping[str, Start[Scales]]) -> dict[str, Scales]:
    """What this round added to each scale."""
    changes = {}
    for name in names:
        now, begun = cast(Tensor, model.get_submodule(name).ia3_s), cast(Tensor, starts[name].own.s)
        changes[name] = Scales(now.detach().cpu() - begun)
    return changes


def received(parts: Mapping[str, Tensor], own: Scales, rank: int, name: str, seed: str) -> Scales:
    """What the round added."""
    return Scales.of(parts)


def total(trained: Scales, start: Start[Scales]) -> Scales:
    """The scales so far, and what this round added."""
    return start.own.plus(trained)


def round_change(trained: Scales, start: Start[Scales], shared_a: bool) -> dict[str, Tensor]:
    """It is one already."""
    return trained.parts()


def after_round(
    state: State[Scales], change: Mapping[str, Tensor], rank: int, dtype: torch.dtype, name: str, seed: str
) -> Scales:
    """The mean change on top of what was there."""
    return state.live.plus(Scales.of(change))


def expected(shape: tuple[int, int], rank: int, dtype: torch.dtype, shared_a: bool) -> TensorSpecs:
    """(out,)."""
    return {"s": (torch.Size([shape[0]]), dtype)}


def merge(weight: Tensor, change: Scales, masked: bool) -> Tensor:
    """diag(1 + s)·W, rounded once; what is not zero stays so."""
    if change.s is None:
        return weight
    merged = ((1.0 + change.s.double())[:, None] * weight.double()).to(weight.dtype)
    return torch.where((weight != 0) & (merged == 0), weight, merged) if masked else merged


def configurations(space: SearchSpace, cost: ModelCost, batch: int) -> list[ClientConfig]:
    """All linears, the most bits first."""
    return [ClientConfig(bits, batch, 1, dict.fromkeys(cost.linears, 1)) for bits in sorted(space.bits, reverse=True)]


def memory(cost: ModelCost, space: SearchSpace, config: ClientConfig) -> float:
    """The frozen weights, and for one window what the blocks keep and what every linear puts out."""
    outputs = sum(rows for rows, _ in cost.linears.values())
    window = costs.activation_bytes(cost, config.bits) + 4 * cost.length * outputs
    return costs.weight_bytes(cost, config.bits) + costs.PER_TUNED * outputs + config.micro * window


def compute_seconds(cost: ModelCost, space: SearchSpace, budget: Budget, config: ClientConfig) -> float:
    """Forwards and back through the frozen model."""
    windows = space.steps * costs.each_device(config.batch, budget)
    return windows * costs.window_operations(cost, space) / budget.speed


def numbers(cost: ModelCost, ranks: Mapping[str, int], shared_a: bool = False) -> int:
    """One for each output channel."""
    return sum(rows for name, (rows, _) in cost.linears.items() if name in ranks)


def shortage(cost: ModelCost, space: SearchSpace, budget: Budget) -> str:
    """One window at once in the fewest bits is too much."""
    need = memory(cost, space, ClientConfig(min(space.bits), space.batches[-1], 1, {}))
    return (
        f"training scales needs {mebibytes(need, enough=True)} of memory, but it has {mebibytes(budget.memory)} "
        "(clients.memory); lower length, or allow fewer bits"
    )


def write_adapter(
    out: Path, decoder: Decoder, changes: Mapping[str, Any], base: str, title: str, pruned: bool, changed: bool
) -> bool:
    """The scales are part of the merged model; there is no folder beside it."""
    return False
