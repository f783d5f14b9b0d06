"""Steps along random directions, of which only coefficients travel: FedKSeed and what we make of it.

FedKSeed (Qin et al., ICML 2024, arXiv 2312.06353): the model is w₀ + Σ c_s·z_s, where everybody regenerates z_s from its seed;
clients find the slope along a direction by two forward passes (MeZO, arXiv 2305.17333), so training takes the memory of
inference. Ours: directions of signs that any slice of a tensor can be generated of (:mod:`fedgrove.models.signs`),
whole-number coefficients (:mod:`fedgrove.stages.tune.seeds.offsets`), directions that all clients share
(:mod:`fedgrove.stages.tune.aggregation.common`), and a measured learning rate and perturbation. Only the linears of the blocks
move: rows of the embedding move only for words that are in the text, so slopes along it might reveal words.

Do not expect LoRA's loss: a step uses one slope instead of a whole gradient. It is for clients with little memory or uplink.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedgrove.models.cost import ModelCost
from fedgrove.quantities import mebibytes
from fedgrove.rounds.capabilities import SPEED
from fedgrove.rounds.request import Disclosure
from fedgrove.stages.tune.aggregation import Drawing, Form, seed_aggregation_of
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.seeds.two_sided import PER_WEIGHT, in_memory

if TYPE_CHECKING:  # the stage's table names its parametrization, so it imports this package
    from fedgrove.stages.tune.config import Config

FORM: Form = "coefficients"
LOOP = "seeds"
DISCLOSES = Disclosure.LOSS_DIFFERENCES
AGGREGATION = "common"
TRAINERS = ("zeroth_order", "dp_zeroth_order")
DEFAULTS: Mapping[str, Any] = {
    "learning_rate": "auto", "precision": "fixed", "steps": 20, "batches": (4,), "length": 128, "replan_every": 5,
}  # fmt: skip
KEYS = frozenset({"seeds", "sampling", "perturbation", "target_modules"})
UNUSED = frozenset({
    "ranks", "bits", "optimizer", "max_grad_norm", "alpha", "deadline", "upload_price", "importance_steps", "proximal",
    "partition", "precision", "max_change", "hold_experts", "expert_value", "personal_experts",
})  # fmt: skip
RANKED = False
RELATIVE = True
PRIVATE = True
PERSONAL = False
FROZEN = False
BY_WINDOWS = True
ALONE = False
SUMS_LOSS = False
CLIPPED = ("slopes", "slope")

SIGN_SECONDS = 1e-8  # of a client of speed 1, for an entry of a linear in a step: two signs, and the weight of either side


@dataclass(frozen=True)
class Coefficients:
    """The steps so far, of all linears together.

    Attributes:
        c: (directions,) int64, in units of :data:`~fedgrove.stages.tune.seeds.offsets.UNIT`.
        draws: (directions,) int64, how often all clients drew each direction.
    """

    c: Tensor
    draws: Tensor

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Coefficients:
        return cls(parts["c"], parts["draws"])

    def parts(self) -> dict[str, Tensor]:
        return {"c": self.c, "draws": self.draws}

    def padded(self, size: int) -> Coefficients:
        """The same steps among more directions."""
        return Coefficients(*(torch.nn.functional.pad(part, (0, size - len(part))) for part in (self.c, self.draws)))


def none(shape: tuple[int, int]) -> Coefficients:
    """No step along any of ``shape[0]`` directions."""
    return Coefficients(*(torch.zeros(shape[0], dtype=torch.int64) for _ in range(2)))


def change_of(parts: Mapping[str, Tensor]) -> Coefficients:
    """From its tensors."""
    return Coefficients.of(parts)


def configurations(space: SearchSpace, cost: ModelCost, batch: int) -> list[ClientConfig]:
    """One configuration: all linears move, in float32. The slopes of bfloat16 are off by a tenth and more."""
    return [ClientConfig(32, batch, 1, dict.fromkeys(cost.linears, 1))]


def memory(cost: ModelCost, space: SearchSpace, config: ClientConfig) -> float:
    """Bytes of the weights in memory, and of one window at the peak: a block's weights on one side, its activations, logits.

    A linear being made takes its offset besides.
    """
    sizes = [rows * columns for rows, columns in cost.linears.values()]
    block = max(cost.multiplied, cost.parameters) / cost.num_blocks
    kept = PER_WEIGHT * cost.parameters if in_memory(cost.parameters) else 4 * block
    states = 4 * 2 * config.batch * 2 * cost.length * cost.width
    window = 4 * cost.saved + cost.logits * 12
    return kept + 9 * block + 12 * max(sizes) + 4 * cost.others + states + window


def compute_seconds(cost: ModelCost, space: SearchSpace, budget: Budget, config: ClientConfig) -> float:
    """Seconds of a round: two forward passes for each window of each step, and the signs. One device does all of it."""
    weights = cost.multiplied + cost.width * cost.vocabulary
    forward = 2 * cost.length * weights + 4 * cost.length**2 * cost.width * cost.num_blocks
    signs = SIGN_SECONDS * max(cost.multiplied, cost.parameters) * SPEED
    return space.steps * (2 * config.batch * forward + signs) / budget.speed


def numbers(cost: ModelCost, ranks: Mapping[str, int], config: Config, sent: bool) -> int:
    """Sent: one for each direction of a round. Received: the coefficients so far, two numbers each; half of all on average."""
    drawing = Drawing(config.seeds, config.steps, 0, "")
    up = len(seed_aggregation_of(config.aggregation).summed(drawing))
    return up if sent else 2 * (config.seeds or config.rounds * config.steps // 2)


def shortage(cost: ModelCost, space: SearchSpace, budget: Budget) -> str:
    """Even inference needs too much memory."""
    return too_little(memory(cost, space, ClientConfig(32, space.batches[-1], 1, {})), budget)


def too_little(need: float, budget: Budget) -> str:
    """The message for a client with less memory than two forward passes need, and the remedy."""
    return (
        f"two forward passes need {mebibytes(need, enough=True)} of memory, but it has {mebibytes(budget.memory)} "
        "(clients.memory); lower length"
    )
