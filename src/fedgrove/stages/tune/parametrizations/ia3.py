"""(IA)³ (Liu et al., NeurIPS 2022): one learnt scale for each output channel of a linear.

From the paper: scales that start at 1 and multiply the output of a linear. Ours: every linear of a block has scales,
not only keys, values and the feed-forward part; they are stored as the difference from 1, so that changes of several
clients can be added; and they multiply W·x without the bias, so that merging gives the weight diag(1 + s)·W. A pruned
model keeps its zeros, because a scaled zero is zero.

(IA)³ can learn less than LoRA: it has one number per output channel, which can only scale that channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import ModelCost
from fedgrove.models.experts import expert_of
from fedgrove.quantities import mebibytes
from fedgrove.rounds.request import Disclosure, TensorSpecs
from fedgrove.stages.tune import cost as costs
from fedgrove.stages.tune import peft_adapter
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.changes import Start, State
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.parametrizations import Attachment
from fedgrove.stages.tune.training import GradientMasks

if TYPE_CHECKING:  # the stage's table names its parametrization, so it imports this package
    from fedgrove.stages.tune.config import Config

FORM: Form = "tensors"
LOOP = "changes"
DISCLOSES = Disclosure.SCALES
AGGREGATION = "fedavg"
TRAINERS = ("sgd", "dp_sgd")
DEFAULTS: Mapping[str, Any] = {}
KEYS: frozenset[str] = frozenset()
UNUSED: frozenset[str] = frozenset()
RANKED = False
RELATIVE = True
PRIVATE = True
PERSONAL = False
FROZEN = True
BY_WINDOWS = False
ALONE = True
SUMS_LOSS = True
CLIPPED = ("change", "gradient")
IN_COMMON: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scales:
    """ΔW = diag(s)·W.

    Attributes:
        s: (out,), each output channel is multiplied by 1 + s; None: all zeros, and nothing is sent.
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

    def largest_norm(self) -> float:
        return self.norm()

    def squared_norm(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64) if self.s is None else self.s.double().square().sum()

    def numel(self) -> int:
        return 1 if self.s is None else self.s.numel()


def none(shape: tuple[int, int]) -> Scales:
    """All channels multiplied by 1."""
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
    """Scales the output of each linear with a forward hook; no gradient needs a mask, because a scaled zero is zero."""
    for name, begun in starts.items():
        module = model.get_submodule(name)
        device = next(module.parameters()).device
        if not hasattr(module, "ia3_s"):
            module.register_forward_hook(_scale)
        module.ia3_s = nn.Parameter(cast(Tensor, begun.own.s).clone().to(device))
    return ()


def _scale(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    bias = cast(Tensor | None, getattr(module, "bias", None))
    product = output if bias is None else output - bias
    return output + (product * cast(Tensor, module.ia3_s)).to(output.dtype)


def detach(model: nn.Module, names: Sequence[str], starts: Mapping[str, Start[Scales]]) -> dict[str, Scales]:
    """The difference that this round made to each scale, (out,) float32."""
    with torch.no_grad():
        return {name: Scales(cast(Tensor, live(model, name, starts[name]).s).cpu()) for name in names}


def live(model: nn.Module, name: str, start: Start[Scales]) -> Scales:
    """The scales as they are now, minus what they were."""
    now = cast(Tensor, model.get_submodule(name).ia3_s)
    return Scales(now - cast(Tensor, start.own.s).to(now.device))


def received(parts: Mapping[str, Tensor], own: Scales, rank: int, name: str, seed: str) -> Scales:
    """The difference that the round made."""
    return Scales.of(parts)


def applied(change: Scales, shape: tuple[int, int]) -> Start[Scales]:
    """The scales, which are attached as those that are trained."""
    return Start(Scales(torch.zeros(shape[0]) if change.s is None else change.s.float()), none(shape))


def mixture(changes: Sequence[Scales], weights: Sequence[float]) -> Scales:
    """Σ weight·s: diag(1 + s)·W is linear in s."""
    return Scales().plus(*(change.scaled(weight) for change, weight in zip(changes, weights, strict=True)))


def total(trained: Scales, start: Start[Scales]) -> Scales:
    """The scales so far plus the difference that this round made."""
    return start.own.plus(trained)


def round_change(trained: Scales, start: Start[Scales], shared_a: bool) -> dict[str, Tensor]:
    """The trained change: it already is the difference that the round made."""
    return trained.parts()


def after_round(
    state: State[Scales], change: Mapping[str, Tensor], rank: int, dtype: torch.dtype, name: str, seed: str
) -> Scales:
    """The state plus the mean difference."""
    return state.live.plus(Scales.of(change))


def expected(shape: tuple[int, int], rank: int, dtype: torch.dtype, shared_a: bool) -> TensorSpecs:
    """One tensor, (out,)."""
    return {"s": (torch.Size([shape[0]]), dtype)}


def merge(weight: Tensor, change: Scales, masked: bool) -> Tensor:
    """diag(1 + s)·W, rounded once to the weight's dtype; if ``masked``, non-zero weights do not become zero."""
    if change.s is None:
        return weight
    merged = ((1.0 + change.s.double())[:, None] * weight.double()).to(weight.dtype)
    return torch.where((weight != 0) & (merged == 0), weight, merged) if masked else merged


def configurations(space: SearchSpace, cost: ModelCost, batch: int) -> list[ClientConfig]:
    """One configuration per number of bits, the most bits first; all linears are tuned."""
    return [ClientConfig(bits, batch, 1, dict.fromkeys(cost.linears, 1)) for bits in sorted(space.bits, reverse=True)]


def memory(cost: ModelCost, space: SearchSpace, config: ClientConfig) -> float:
    """Bytes of the frozen weights and trained scales, and of windows their activations and every linear's output."""
    scales = sum(rows for rows, _ in cost.linears.values())
    outputs = sum(cost.uses(name) * rows for name, (rows, _) in cost.linears.items())
    windows = costs.activation_bytes(cost, config.bits, config.micro) + config.micro * 4 * cost.length * outputs
    frozen = costs.weight_bytes(cost, config.bits) + costs.working_bytes(cost, config.bits, config.micro)
    return frozen + costs.PER_TUNED * scales + windows


def compute_seconds(cost: ModelCost, space: SearchSpace, budget: Budget, config: ClientConfig) -> float:
    """Seconds of the forward and backward passes of a round through the frozen model."""
    windows = space.steps * costs.each_device(config.batch, budget)
    return windows * costs.window_operations(cost) / budget.speed


def numbers(cost: ModelCost, ranks: Mapping[str, int], config: Config, sent: bool) -> int:
    """One for each output channel."""
    return sum(rows for name, (rows, _) in cost.linears.items() if name in ranks)


def shortage(cost: ModelCost, space: SearchSpace, budget: Budget) -> str:
    """Even a micro-batch of one window in the bits that take least needs too much memory."""
    need = min(memory(cost, space, ClientConfig(bits, space.batches[-1], 1, {})) for bits in space.bits)
    return (
        f"training the scales needs {mebibytes(need, enough=True)} of memory, but it has {mebibytes(budget.memory)} "
        "(clients.memory); lower length, or allow fewer bits"
    )


def fits_peft(decoder: Decoder) -> bool:
    """Plain peft also scales the bias of a linear, and has no adapters for single experts."""
    stored = decoder.linear_names()
    biases = (f"{name.removesuffix('weight')}bias" for name in stored.values())
    return not any(map(expert_of, stored)) and not any(map(decoder.checkpoint.__contains__, biases))


def write_adapter(
    out: Path, decoder: Decoder, changes: Mapping[str, Scales], base: str, title: str, pruned: bool, changed: bool
) -> bool:
    """See :func:`fedgrove.stages.tune.peft_adapter.write_ia3`."""
    scales = {name: change.s for name, change in changes.items() if change.s is not None}
    return fits_peft(decoder) and peft_adapter.write_ia3(out, decoder, scales, base, title, changed)
