"""Parametrizations: what is trained of a linear, and the form of its change. A new parametrization is a new file here.

The client's half attaches a change to the model and extracts it after training. The server's half defines the content
of a response, its cost, and how the change is merged into the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from fedgrove import plugins
from fedgrove.models.cost import ModelCost
from fedgrove.rounds.request import Disclosure, TensorSpecs
from fedgrove.stages.tune.aggregation import Form
from fedgrove.stages.tune.changes import Start
from fedgrove.stages.tune.cost import Budget, ClientConfig, SearchSpace
from fedgrove.stages.tune.training import GradientMasks

if TYPE_CHECKING:  # whoever reads a job need not wait for transformers
    from fedgrove.models.blocks import Decoder
    from fedgrove.stages.tune.config import Config

PACKAGE = "stages.tune.parametrizations"


@dataclass(frozen=True)
class Attachment:
    """How changes are attached to a client's model.

    Attributes:
        scales: by linear, LoRA's α/r; only for parametrizations with ranks.
        masks: by linear, (out, in) bool, True = kept; only for linears whose zeros must stay zero.
        shared_a: all clients share one A, which is not trained.
    """

    scales: Mapping[str, float]
    masks: Mapping[str, Tensor]
    shared_a: bool = False


class Parametrization(Protocol):
    """What every parametrization's file has: all that a job and a plan need to know.

    One that clients train linear by linear has the whole contract, :class:`Trainable`.

    Attributes:
        FORM: the form of its changes; see :mod:`fedgrove.stages.tune.aggregation`.
        LOOP: the file of :mod:`fedgrove.stages.tune.loops` that runs its rounds.
        DISCLOSES: what a response reveals about a client's text.
        AGGREGATION: the default aggregation.
        TRAINERS: the default trainer, and the one that protects single windows with noise.
        DEFAULTS: defaults of other keys of the job that differ from those of the other parametrizations.
        KEYS: keys of the job that only some parametrizations use, this one among them.
        UNUSED: keys of the job that have no effect, and so must keep their defaults.
        RANKED: whether a linear has a rank that can be chosen. If not, plans record rank 1.
        RELATIVE: True: clients send the difference that a round made; False: the values at the end of the round.
        PRIVATE: whether it can be trained with differential privacy.
        PERSONAL: whether clients can keep a personal change.
        FROZEN: whether the weights themselves stay as they are, so that they can be held in fewer bits; if not, in 32.
        BY_WINDOWS: whether a client counts by its windows in a step, of which it then gets as many as it has text; else it
            counts by its tokens.
        ALONE: whether the model that a client would have without the others can be measured.
        SUMS_LOSS: whether the loss is part of the sum, where only sums may be seen; else it is not sent there.
        CLIPPED: what noise protects, in words: what a client sends, and what a window adds to it.
    """

    FORM: Form
    LOOP: str
    DISCLOSES: Disclosure
    AGGREGATION: str
    TRAINERS: tuple[str, str]
    DEFAULTS: Mapping[str, Any]
    KEYS: frozenset[str]
    UNUSED: frozenset[str]
    RANKED: bool
    RELATIVE: bool
    PRIVATE: bool
    PERSONAL: bool
    FROZEN: bool
    BY_WINDOWS: bool
    ALONE: bool
    SUMS_LOSS: bool
    CLIPPED: tuple[str, str]

    def none(self, shape: tuple[int, int]) -> Any:
        """The zero change of a weight (out, in)."""
        ...

    def change_of(self, parts: Mapping[str, Tensor]) -> Any:
        """A change from its tensors, by name of the part."""
        ...

    def configurations(self, space: SearchSpace, cost: ModelCost, batch: int) -> list[ClientConfig]:
        """The configurations that planner "uniform" can give to all clients, best first; with one window at once."""
        ...

    def memory(self, cost: ModelCost, space: SearchSpace, config: ClientConfig) -> float:
        """Bytes at the peak of training, without the process itself."""
        ...

    def compute_seconds(self, cost: ModelCost, space: SearchSpace, budget: Budget, config: ClientConfig) -> float:
        """Seconds of computation in a round."""
        ...

    def numbers(self, cost: ModelCost, ranks: Mapping[str, int], config: Config, sent: bool) -> int:
        """How many numbers a client sends, or receives, in a round.

        Args:
            ranks: by linear.
            config: the stage's table.
            sent: whether the client sends them.
        """
        ...

    def shortage(self, cost: ModelCost, space: SearchSpace, budget: Budget) -> str:
        """The message for a client with too little memory: how much it needs, and the remedy."""
        ...


class Trainable(Parametrization, Protocol):
    """The contract of a parametrization that clients train linear by linear, by gradients."""

    def start(
        self, own: Mapping[str, Tensor], rest: Mapping[str, Tensor], shape: tuple[int, int], rank: int, name: str, seed: str
    ) -> Start[Any]:
        """What a client starts with.

        Args:
            own: the parts of the trained change that came with a request; missing parts are initialized.
            rest: the parts of the remaining change, which is not trained.
            shape: (out, in) of the weight.
            rank: to train; 0: the client does not train this linear.
            name: the linear's, which with ``seed`` determines the initial values.
        """
        ...

    def attach(self, model: nn.Module, starts: Mapping[str, Start[Any]], how: Attachment) -> GradientMasks:
        """Attaches the changes to a frozen model and sets ``requires_grad`` on what is trained.

        If ``FROZEN``, changes of the same linears may be attached already; their values are replaced.

        Returns:
            Parameters whose gradient must be masked, with their masks.
        """
        ...

    def detach(self, model: nn.Module, names: Sequence[str], starts: Mapping[str, Start[Any]]) -> dict[str, Any]:
        """The trained change of each of these linears, on the CPU; see ``RELATIVE``."""
        ...

    def live(self, model: nn.Module, name: str, start: Start[Any]) -> Any:
        """The change of a linear in training, as :meth:`detach` would give it: on the model's device, differentiable."""
        ...

    def received(self, parts: Mapping[str, Tensor], own: Any, rank: int, name: str, seed: str) -> Any:
        """A change from the parts that a client sent.

        Args:
            own: the trained part of the client's start, from which parts that are not sent are taken.
        """
        ...

    def total(self, trained: Any, start: Start[Any]) -> Any:
        """The complete change of the weight at the client after training, including the part that was not trained."""
        ...

    def round_change(self, trained: Any, start: Start[Any], shared_a: bool) -> dict[str, Tensor]:
        """The difference that a round made, by part, for sums of fixed-point numbers."""
        ...

    def after_round(self, state: Any, change: Mapping[str, Tensor], rank: int, dtype: torch.dtype, name: str, seed: str) -> Any:
        """The live part of the state after a round.

        Args:
            state: the server's state before the round.
            change: the mean of the clients' :meth:`round_change`.
            dtype: in which the clients received the state.
        """
        ...

    def expected(self, shape: tuple[int, int], rank: int, dtype: torch.dtype, shared_a: bool) -> TensorSpecs:
        """Shape and dtype of each part that a client sends for a linear."""
        ...

    def merge(self, weight: Tensor, change: Any, masked: bool) -> Tensor:
        """The weight (out, in) plus its change, rounded once to the weight's dtype; zeros stay zero if ``masked``."""
        ...

    def write_adapter(
        self, out: Path, decoder: Decoder, changes: Mapping[str, Any], base: str, title: str, pruned: bool, changed: bool
    ) -> bool:
        """Writes the changes as an adapter that plain peft loads.

        Args:
            base: the model that the job names.
            title: the title of the adapter's card.
            pruned: the model has zeros that the adapter would refill; the card then warns about this.
            changed: earlier stages changed the model, so the adapter does not fit the model that the job names.

        Returns:
            Whether an adapter was written: not if plain peft has none, or if nothing changes.
        """
        ...


class Mixable(Trainable, Protocol):
    """The contract of a parametrization whose changes can be members of a pool.

    Attributes:
        IN_COMMON: the parts of a change that all members have in common.
    """

    IN_COMMON: tuple[str, ...]

    def applied(self, change: Any, shape: tuple[int, int]) -> Start[Any]:
        """A complete change of a weight (out, in) that is only measured, as :meth:`attach` takes it."""
        ...

    def mixture(self, changes: Sequence[Any], weights: Sequence[float]) -> Any:
        """Σ weight · change, exactly, of changes of one linear.

        Raises:
            ValueError: that is no change of the same form, as the parts of ``IN_COMMON`` differ.
        """
        ...

    def fits_peft(self, decoder: Decoder) -> bool:
        """Whether plain peft has adapters for what is trained of this model."""
        ...


METHOD = Parametrization
CONTRACTS: dict[Form, Any] = {"factors": Trainable, "tensors": Trainable, "coefficients": Parametrization}


def parametrization_of(name: str) -> Parametrization:
    """Loads a parametrization by name; it fulfils the contract of its form."""
    found = cast(Parametrization, plugins.load(PACKAGE, name))
    plugins.load(PACKAGE, name, CONTRACTS[found.FORM])
    return found


def trainable_of(name: str) -> Trainable:
    """Loads a parametrization that clients train linear by linear."""
    return cast(Trainable, plugins.load(PACKAGE, name, Trainable))


def mixable_of(name: str) -> Mixable:
    """Loads a parametrization of which a pool can have members."""
    return cast(Mixable, plugins.load(PACKAGE, name, Mixable))
