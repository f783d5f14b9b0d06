"""Before a pool is trained, a gate that looks at features is fitted to the windows of all clients, by sums of whole numbers.

First every client sums its features and their products, from which the server takes what features are scaled by; of a gate of
owners it sends its own direction instead. Then come the exchanges of the fit; the last one counts how likely windows are that
were not fitted.

With ``epsilon`` the direction gets noise, once. The exchanges after it see nothing else of the text, and the last one is left
out.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Delta, Epsilon
from fedgrove.models.blocks import Decoder
from fedgrove.privacy.accounting import noise_of_part
from fedgrove.privacy.gaussian import GaussianMechanism
from fedgrove.rounds.aggregator import moments
from fedgrove.rounds.aggregator.moments import MOST_RECORDS, Moments
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.pool.config import AUTO, Size
from fedgrove.stages.tune.pool.features import (
    DIRECTION,
    FittedRequest,
    GateRequest,
    is_held_out,
    keep_directions,
    numbers_in,
)
from fedgrove.stages.tune.pool.novelty import BINS, count
from fedgrove.stages.tune.pool.scale import OWNERS, at_random, directions_of, own_products, unit

NOVELTY, NUMBER, OWN = "novelty", "owners", "own"
MOST_WINDOWS = 2**18  # of all clients: the largest sum of a fit is 2^(20 + 2·12) times as large, below 2^63


class SumFeatures(GateRequest):
    """Sum the features of your windows in the frozen model, and their squares and products.

    The response holds int64: ``change/counts`` (1,), ``change/sums`` (1, features), ``change/squares`` and ``change/products``;
    see :class:`~fedgrove.rounds.aggregator.moments.Moments`. With ``between`` also ``change/own``, see
    :func:`fedgrove.stages.tune.pool.scale.own_products`.

    Attributes:
        between: whether directions between owners are sought.
    """

    KIND: ClassVar[str] = "tune/gate/features"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.COMPONENT_SUMS, Disclosure.FEATURE_PRODUCTS})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "held"})

    between: bool

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        numbers = self.numbers(tensors, client, device)
        numbers = numbers[~is_held_out(len(numbers))]
        if len(numbers) > MOST_WINDOWS:
            raise client.error(f"it has {len(numbers)} windows, but at most {MOST_WINDOWS} can be summed", "raise length")
        found = Moments.over(numbers, torch.zeros(len(numbers), dtype=torch.int64), 1, products=True)
        sums = found.tensors() | ({OWN: own_products(found)} if self.between else {})
        return Response({CHANGE + name: tensor for name, tensor in sums.items()}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        number = numbers_in(layout, self.blocks)
        specs = moments.specs(1, number, True)
        if self.between:
            specs = {**specs, OWN: (torch.Size([number * (number + 1) // 2]), torch.int64)}
        return {CHANGE + name: spec for name, spec in specs.items()}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        self.check_sums(_named(tensors))

    def check_sums(self, sums: Tensors) -> None:
        """Refuses sums that no clients have, by name without ``change/``.

        Raises:
            WireError: says what is out of range.
        """
        found = Moments.of(sums)
        moments.check(found, MOST_RECORDS)
        if self.between:
            squares = found.squares.double()
            rows, columns = torch.triu_indices(len(squares), len(squares))
            largest = (squares[rows] * squares[columns]).sqrt() * (1 + 1e-9) + MOST_WINDOWS  # each owner rounds
            if bool((sums[OWN].double().abs() > largest).any()):
                raise WireError("its own sums' products are larger than its squares allow")

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return range(1)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if config.pool is not None and self.between != (config.pool.directions == "owners"):
            return "pool.directions"
        return "gate" if self.method.OF_CLIENTS else super().beyond(job)


class SendDirection(GateRequest):
    """Send the direction of your text: of the sum of your windows' features, each of norm 1.

    The response holds int64: ``change/direction`` (1 or 3, size) in multiples of 2⁻¹⁶, and ``change/owners`` (1,), which is 1.
    The client keeps its direction for the exchanges after this one. Without noise every fifth window is left out, and says
    later what is usual.

    Attributes:
        size: of a direction.
        halves: whether those of both halves of the text follow, first and last windows: they say how many kinds of owners there
            are. A window is in one of them, so noise on the halves is enough.
        budget: (ε, δ) of the stage: the sum gets noise for a part of it; None: no noise.
    """

    KIND: ClassVar[str] = "tune/gate/direction"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.DIRECTION})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "held"})

    size: Size
    halves: bool
    budget: tuple[Epsilon, Delta] | None

    def release(self) -> str | None:
        return f"{self.stage}/direction" if self.budget else None

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        numbers = self.numbers(tensors, client, device)
        along = at_random(numbers.shape[1], self.size, self.seed)
        fitted = numbers if self.budget else numbers[~is_held_out(len(numbers))]
        totals = torch.stack([part.sum(0) for part in unit(fitted, along).tensor_split(2 if self.halves else 1)])
        if self.budget:
            totals = GaussianMechanism(1 + 1e-9, noise_of_part(*self.budget), adders=1).add_share(totals)
        found = directions_of(totals)
        keep_directions(client, self.stage, found)
        one = torch.ones(1, dtype=torch.int64)
        return Response({CHANGE + DIRECTION: OWNERS.encode(found), CHANGE + NUMBER: one}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        number = numbers_in(layout, self.blocks)
        shapes = {DIRECTION: (3 if self.halves else 1, min(self.size, number)), NUMBER: (1,)}
        return {CHANGE + name: (torch.Size(shape), torch.int64) for name, shape in shapes.items()}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        if int(tensors[CHANGE + NUMBER]) != 1:
            raise WireError("it is not one owner")
        self.check_sums(_named(tensors))

    def check_sums(self, sums: Tensors) -> None:
        """As :meth:`SumFeatures.check_sums`."""
        number = int(sums[NUMBER])
        lengths = OWNERS.decode(sums[DIRECTION]).norm(dim=1)
        if number < 1 or not bool((lengths <= number * (1 + 1e-3)).all()):  # rounding makes them longer
            raise WireError("its direction is longer than 1")

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return range(1)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if config.pool is not None and self.size != config.pool.size:
            return "pool.size"
        if config.pool is not None and self.halves != (config.pool.members == AUTO):
            return "pool.members"
        if self.budget != config.privacy_budget():
            return "epsilon"
        return super().beyond(job) if self.method.OF_CLIENTS else "gate"


class FitGate(FittedRequest):
    """Sum how your windows belong to the components of a gate; the last time, also how likely windows are that were not fitted.

    The round counts the exchanges of the fit, from 1. The response holds int64: ``change/NAME`` for each sum of the gate; at
    the end it holds ``change/novelty`` (bins,) instead, see :mod:`fedgrove.stages.tune.pool.novelty`.

    Attributes:
        last: whether it is the end.
    """

    KIND: ClassVar[str] = "tune/gate/fit"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.COMPONENT_SUMS, Disclosure.LIKELIHOODS})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "held"})

    last: bool = False

    def discloses(self) -> frozenset[Disclosure]:
        return frozenset({Disclosure.LIKELIHOODS if self.last else Disclosure.COMPONENT_SUMS})

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        state = self.state(tensors, client)
        if self.last:
            features = self.features(tensors, client, device)
            counts = count(self.method.surprise(features[is_held_out(len(features))], state))
            return Response({CHANGE + NOVELTY: counts}, Reply())
        fitted = self.fitted(tensors, client, device)
        if not self.method.OF_CLIENTS:
            fitted = fitted[~is_held_out(len(fitted))]
        sums = self.method.observe(fitted, state)
        return Response({CHANGE + name: value for name, value in sums.items()}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        if self.last:
            return {CHANGE + NOVELTY: (torch.Size([BINS]), torch.int64)}
        specs = self.method.sums(self.members, self.starts, self.size)
        return {CHANGE + name: spec for name, spec in specs.items()}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        self.check_sums(_named(tensors))

    def check_sums(self, sums: Tensors) -> None:
        """As :meth:`SumFeatures.check_sums`."""
        if not self.last:
            self.method.check(sums, MOST_WINDOWS)
        elif bool((sums[NOVELTY] < 0).any()) or bool((sums[NOVELTY] > MOST_WINDOWS).any()):
            raise WireError("its numbers of windows are out of range")

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        """The exchanges of the fit, and one more at the end."""
        assert isinstance(config, Config)
        return range(1, (config.pool.fit_rounds if config.pool else 0) + 2)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if self.last and config.noisy_gate:
            return "epsilon"
        starts = 1 if self.last or config.pool is None else config.pool.side_by_side
        return "pool.starts" if self.starts != starts else super().beyond(job)


def _named(tensors: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix(CHANGE): tensor for name, tensor in tensors.items()}
