"""What is trained of a linear, and how its change is represented: a new parametrization is a new file here.

The client's half puts a change into the model, lets a trainer train it and takes it out again; the server's half says what a
response holds, what it costs and how the change becomes part of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedgrove import plugins
from fedgrove.models.blocks import Decoder
from fedgrove.models.cost import ModelCost
from fedgrove.rounds.request import Disclosure, TensorSpecs
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.changes import Start
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.training import GradientMasks

PACKAGE = "stages.tune.parametrizations"


@dataclass(frozen=True)
class Attachment:
    """How a change is put into a client's model.

    Attributes:
        scales: by linear: LoRA's α/r, for parametrizations with ranks.
        masks: by linear, (out, in) bool, True = kept: of the linears whose zeros are to stay.
        shared_a: all clients share one A, which is not trained.
    """

    scales: Mapping[str, float]
    masks: Mapping[str, Tensor]
    shared_a: bool = False


class Parametrization(Protocol):
    """What a parametrization's file holds.

    Attributes:
        FORM: of its changes; see :mod:`fedgrove.stages.tune.aggregation`.
        DISCLOSES: what a client sends.
        AGGREGATION: the aggregation that is taken where a job names none.
        RANKED: whether a linear has a rank that can be chosen. Where it has none, its rank is said to be 1.
        RELATIVE: clients send what a round changed; else, where it ended.
        PRIVATE: whether it can be trained with noise.
        PERSONAL: whether clients can keep one of their own.
    """

    FORM: Form
    DISCLOSES: Disclosure
    AGGREGATION: str
    RANKED: bool
    RELATIVE: bool
    PRIVATE: bool
    PERSONAL: bool

    def none(self, shape: tuple[int, int]) -> Any:
        """No change of a weight (out, in)."""
        ...

    def change_of(self, parts: Mapping[str, Tensor]) -> Any:
        """A change from its tensors."""
        ...

    def start(
        self, own: Mapping[str, Tensor], rest: Mapping[str, Tensor], shape: tuple[int, int], rank: int, name: str, seed: str
    ) -> Start[Any]:
        """What a client begins with, from the parts that came with a request; what is missing begins anew."""
        ...

    def attach(self, model: nn.Module, starts: Mapping[str, Start[Any]], how: Attachment) -> GradientMasks:
        """Puts the changes into a frozen model and opens what is trained.

        Returns:
            Parameters whose gradient is masked.
        """
        ...

    def detach(self, model: nn.Module, names: Sequence[str], starts: Mapping[str, Start[Any]]) -> dict[str, Any]:
        """What was trained, by linear, on the CPU: see ``RELATIVE``."""
        ...

    def received(self, parts: Mapping[str, Tensor], own: Any, rank: int, name: str, seed: str) -> Any:
        """A change from what a client sent.

        Args:
            own: what the client began with, from which parts follow that are not sent.
        """
        ...

    def total(self, trained: Any, start: Start[Any]) -> Any:
        """The whole change that a client computed with."""
        ...

    def round_change(self, trained: Any, start: Start[Any], shared_a: bool) -> dict[str, Tensor]:
        """What a round changed, by part: for sums of fixed-point numbers."""
        ...

    def after_round(self, state: Any, change: Mapping[str, Tensor], rank: int, dtype: torch.dtype, name: str, seed: str) -> Any:
        """The live change after a round, from the mean of what clients changed (:meth:`round_change`).

        Args:
            state: the server's, as the clients were given it in ``dtype``.
        """
        ...

    def expected(self, shape: tuple[int, int], rank: int, dtype: torch.dtype, shared_a: bool) -> TensorSpecs:
        """Shape and dtype of each part that a client sends of a linear."""
        ...

    def merge(self, weight: Tensor, change: Any, masked: bool) -> Tensor:
        """The weight (out, in) with its change, in its own dtype, rounded once; its zeros stay if ``masked``."""
        ...

    def configurations(self, space: SearchSpace, cost: ModelCost, batch: int) -> list[ClientConfig]:
        """What all clients may be given alike, the best first; one window at once."""
        ...

    def memory(self, cost: ModelCost, space: SearchSpace, config: ClientConfig) -> float:
        """Bytes at the peak of training, besides the program itself."""
        ...

    def compute_seconds(self, cost: ModelCost, space: SearchSpace, budget: Budget, config: ClientConfig) -> float:
        """Seconds of computing in a round."""
        ...

    def numbers(self, cost: ModelCost, ranks: Mapping[str, int], shared_a: bool = False) -> int:
        """Numbers of a change on the wire."""
        ...

    def shortage(self, cost: ModelCost, space: SearchSpace, budget: Budget) -> str:
        """Why a client with too little memory cannot take part, and what would do."""
        ...

    def write_adapter(
        self, out: Path, decoder: Decoder, changes: Mapping[str, Any], base: str, title: str, pruned: bool, changed: bool
    ) -> bool:
        """Writes the result as an adapter that plain peft loads; False where there is no such form.

        Args:
            base: the model that the job names; title: of the adapter's card.
            pruned: the model has zeros that the adapter would refill; its card then says so.
            changed: earlier stages changed the model, so that the base is not the one that the job names.
        """
        ...


METHOD = Parametrization


def parametrization_of(name: str) -> Parametrization:
    """The parametrization of that name."""
    return cast(Parametrization, plugins.load(PACKAGE, name))
