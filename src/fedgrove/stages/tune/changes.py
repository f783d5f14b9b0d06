"""The change of a linear's weight: trained, sent, summed and merged. Its form depends on the parametrization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from fedgrove.models.blocks import Decoder


class Change(Protocol):
    """A change of a weight (out, in). The server adds, scales and measures changes of any form by these methods."""

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Self:
        """A change from its tensors, by name of the part."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """The tensors of the change, by name of the part, as they are sent and stored. Empty if nothing changes."""
        ...

    def plus(self, *others: Self) -> Self:
        """The sum of the changes."""
        ...

    def scaled(self, scale: float) -> Self:
        """scale · change."""
        ...

    def compress(self, rank: int | None = None) -> Self:
        """The same change, or for low-rank forms its best approximation of at most ``rank`` terms."""
        ...

    def norm(self) -> float:
        """The Frobenius norm of the change."""
        ...

    def largest_norm(self) -> float:
        """An upper bound of :meth:`norm` that no cancellation within the change can make too small."""
        ...

    def squared_norm(self) -> Tensor:
        """The square of :meth:`norm`, a float64 scalar; differentiable."""
        ...

    def numel(self) -> int:
        """The number of entries of the change, for its mean square; 1 for no change."""
        ...


C = TypeVar("C", bound=Change)


@dataclass(frozen=True)
class State(Generic[C]):
    """A linear's change at the server.

    Attributes:
        live: the part that clients continue to train.
        frozen: the part that clients no longer train.
    """

    live: C
    frozen: C

    def total(self) -> C:
        """The complete change of the weight."""
        return self.frozen.plus(self.live)


@dataclass(frozen=True)
class Start(Generic[C]):
    """The change of a linear's weight with which a client starts a round.

    Attributes:
        own: the part that the client trains.
        rest: the remaining part, which is added in the forward pass and not trained.
    """

    own: C
    rest: C


@dataclass(frozen=True)
class Outcome:
    """What a client's round of training came to.

    Attributes:
        trained: by linear, the part of the change that was trained.
        starts: where it began.
        shapes: of all linears of the model, also of experts that the client does not hold.
        loss: mean training loss per token; None if it was not finite, where noise protects the text.
        tokens: that reached each expert; None if they do not count.
        decoder: the model.
    """

    trained: Mapping[str, Any]
    starts: Mapping[str, Start[Any]]
    shapes: Mapping[str, tuple[int, int]]
    loss: float | None
    tokens: Tensor | None
    decoder: Decoder
