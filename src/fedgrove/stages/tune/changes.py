"""The change of a linear's weight, in whatever form a parametrization gives it: what is trained, sent, summed and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor


class Change(Protocol):
    """A change of a weight (out, in). The server adds, scales and measures it without knowing its form."""

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Self:
        """From its tensors, by name of the part."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """Its tensors, by name of the part: what is sent and what is kept in files. Empty where nothing changes."""
        ...

    def plus(self, *others: Self) -> Self:
        """The sum of the changes."""
        ...

    def scaled(self, scale: float) -> Self:
        """scale · change."""
        ...

    def compress(self, rank: int | None = None) -> Self:
        """The same change, or the nearest of at most ``rank`` terms where the form has terms."""
        ...

    def norm(self) -> float:
        """Its Frobenius norm."""
        ...

    def numel(self) -> int:
        """Numbers of the weight that it changes."""
        ...


C = TypeVar("C", bound=Change)


@dataclass(frozen=True)
class State(Generic[C]):
    """A linear's change at the server.

    Attributes:
        live: what clients train on.
        frozen: what has become part of the base.
    """

    live: C
    frozen: C

    def total(self) -> C:
        """The change of the weight."""
        return self.frozen.plus(self.live)


@dataclass(frozen=True)
class Start(Generic[C]):
    """What a client begins with.

    Attributes:
        own: what it trains.
        rest: the remainder of the change, which it computes with and does not touch.
    """

    own: C
    rest: C
