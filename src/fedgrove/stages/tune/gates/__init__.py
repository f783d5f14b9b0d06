"""Gates of a pool: how much of each member a piece of text gets. A new gate is a new file here, named as in the job.

A pool has several adapters, its members. What a gate looks at (``LOOKS``) decides which contract its file fulfils: at what the
job says of the owners (:class:`JobGate`), at features of windows in the frozen model (:class:`FeatureGate`), at the members'
losses (:class:`LossGate`), or at what the owners' training changes (:class:`ChangeGate`).

Of a window a gate looks at the first tokens (``prefix``). An owner's weights come from its own text; who measures weights of
single windows has to leave these tokens out of the loss, or the gate has seen what is predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor

from fedgrove import plugins
from fedgrove.rounds.request import Tensors, TensorSpecs

if TYPE_CHECKING:  # the stage's table names its gate, so it imports this package
    from fedgrove.stages.tune.pool.config import Pool

PACKAGE = "stages.tune.gates"
Looks = Literal["job", "features", "members", "changes"]


class Gate(Protocol):
    """What every gate's file has.

    Attributes:
        LOOKS: at what.
        OF_CLIENTS: whether a client trains one member with all its text; else each of its windows goes to a member.
        CHOOSES: whether it finds the number of members (``members = "auto"``).
        KEYS: keys of the table ``pool`` that only some gates use, this one among them.
    """

    LOOKS: Looks
    OF_CLIENTS: bool
    CHOOSES: bool
    KEYS: frozenset[str]


class JobGate(Gate, Protocol):
    """A gate that knows each client's member before anything runs."""

    def deal(self, pool: Pool, clients: Sequence[str], seed: str) -> dict[str, int]:
        """The index of each client's member.

        Args:
            clients: all clients of the job.

        Raises:
            ValueError: they cannot be dealt; begins with the key of ``pool``.
        """
        ...


class FeatureGate(Gate, Protocol):
    """A gate that is fitted to the features of all clients' windows, by sums of whole numbers.

    Features (windows, size) float64 have mean 0 and no correlation over all windows, a variance of 1 (within owners, or over
    all windows), are clipped to ±16 and rounded to multiples of 2⁻⁸. A gate ``OF_CLIENTS`` gets one row for each owner
    instead, see :mod:`fedgrove.stages.tune.pool.scale`, and of windows their directions relative to the same mean. A state is
    tensors by name, (starts, members, …) each. During the fit starts are fitted side by side.

    Attributes:
        SAYS: what the second value of :meth:`settle` is, in words, with a place for it.
    """

    SAYS: str

    def begin(self, pool: Pool, size: int, seed: str) -> Tensors:
        """The state before the first exchange.

        Args:
            size: number of features.
        """
        ...

    def specs(self, members: int, starts: int, size: int) -> TensorSpecs:
        """Names, shapes and dtypes of a state, for the client that gets it."""
        ...

    def is_valid(self, state: Tensors) -> bool:
        """Whether a state that a client got, of the right shapes, can come from a fit: else it could single windows out."""
        ...

    def observe(self, features: Tensor, state: Tensors) -> Tensors:
        """What a client adds to the sum: int64, and the same whichever client has a window."""
        ...

    def sums(self, members: int, starts: int, size: int) -> TensorSpecs:
        """Names, shapes and dtypes of what :meth:`observe` returns."""
        ...

    def check(self, sums: Tensors, windows: int) -> None:
        """Refuses sums that so many windows do not have.

        Raises:
            WireError: says what is out of range.
        """
        ...

    def settle(self, state: Tensors, sums: Tensors) -> tuple[Tensors, float]:
        """One step of the fit, and how well the best start fitted before it, as ``SAYS`` names it.

        The fit ends when that rises no more.
        """
        ...

    def finish(self, state: Tensors, sums: Tensors, fewest: int) -> Tensors:
        """The best start alone, without members that fewer than ``fewest`` clients hold."""
        ...

    def kept(self, state: Tensors, members: Tensor) -> Tensors:
        """The state of one start without some of its members.

        Args:
            members: those that stay, (members,) bool, at least one.
        """
        ...

    def weights(self, features: Tensor, state: Tensors) -> Tensor:
        """How much of each member one owner's windows get: (windows, members) float64, each row adds up to 1."""
        ...

    def surprise(self, features: Tensor, state: Tensors) -> Tensor:
        """How unlike the federation's text windows are: (windows,) float64, −log p per feature."""
        ...


class LossGate(Gate, Protocol):
    """A gate that measures every member on some of a client's windows, before every round."""

    def choose(self, losses: Sequence[float]) -> int:
        """The index of a client's member.

        Args:
            losses: of each member, the mean loss of a token.
        """
        ...


class ChangeGate(Gate, Protocol):
    """A gate that gives each owner a member, and says after every round which part of each owner's change goes into it."""

    def weights(self, products: Tensor, squares: Tensor, rounds: Tensor, windows: Tensor) -> Tensor:
        """How much of each owner's mean change per round each owner gets: (owners, owners) float64; every row adds up to 1.

        Args:
            products: of the owners' changes, each summed over its rounds, the inner products: (owners, owners) float64.
            squares: the squared norms of an owner's changes of single rounds, summed: (owners,) float64.
            rounds: how many rounds each owner was in: (owners,) int64.
            windows: of each owner, (owners,) float64.
        """
        ...


def normal(shape: tuple[int, ...], seed: str) -> Tensor:
    """Gaussian numbers from a seed, float64, the same on every machine."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


METHOD = Gate
CONTRACTS: Mapping[Looks, Any] = {"job": JobGate, "features": FeatureGate, "members": LossGate, "changes": ChangeGate}


def gate_of(name: str) -> Gate:
    """Loads a gate by name; it fulfils the contract of what it looks at."""
    found = cast(Gate, plugins.load(PACKAGE, name))
    plugins.load(PACKAGE, name, CONTRACTS[found.LOOKS])
    return found


def job_gate_of(name: str) -> JobGate:
    """Loads a gate that looks at the job."""
    return cast(JobGate, plugins.load(PACKAGE, name, JobGate))


def feature_gate_of(name: str) -> FeatureGate:
    """Loads a gate that looks at features."""
    return cast(FeatureGate, plugins.load(PACKAGE, name, FeatureGate))


def loss_gate_of(name: str) -> LossGate:
    """Loads a gate that looks at losses."""
    return cast(LossGate, plugins.load(PACKAGE, name, LossGate))


def change_gate_of(name: str) -> ChangeGate:
    """Loads a gate that looks at what training changes."""
    return cast(ChangeGate, plugins.load(PACKAGE, name, ChangeGate))
