"""Before a pool is trained, a gate that looks at features is fitted to the windows of all clients, by sums of whole numbers.

First every client sums its features and their products, from which the server takes what features are scaled by; then come the
exchanges of the fit; the last one also counts how likely windows are that were not fitted.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.models.blocks import Decoder
from fedgrove.models.features import width
from fedgrove.rounds.aggregator import moments
from fedgrove.rounds.aggregator.moments import MOST_RECORDS, Moments
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.pool.features import FittedRequest, GateRequest, is_held_out, layers_of
from fedgrove.stages.tune.pool.novelty import BINS, count
from fedgrove.stages.tune.pool.scale import PROJECTED

NOVELTY = "novelty"
MOST_WINDOWS = 2**18  # of all clients: the largest sum of a fit is 2^(20 + 2·12) times as large, below 2^63


class SumFeatures(GateRequest):
    """Sum the features of your windows in the frozen model, and their squares and products.

    The response holds int64: ``change/counts`` (1,), ``change/sums`` (1, features), ``change/squares`` and ``change/products``;
    see :class:`~fedgrove.rounds.aggregator.moments.Moments`.
    """

    KIND: ClassVar[str] = "tune/gate/features"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.COMPONENT_SUMS, Disclosure.FEATURE_PRODUCTS})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "held"})

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        numbers = self.numbers(tensors, client, device)
        numbers = numbers[~is_held_out(len(numbers))]
        if len(numbers) > MOST_WINDOWS:
            raise client.error(f"it has {len(numbers)} windows, but at most {MOST_WINDOWS} can be summed", "raise length")
        found = Moments.over(numbers, torch.zeros(len(numbers), dtype=torch.int64), 1, products=True)
        return Response({CHANGE + name: tensor for name, tensor in found.tensors().items()}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        number = min(PROJECTED, width(layout, layers_of(self.blocks, len(layout))))
        return {CHANGE + name: spec for name, spec in moments.specs(1, number, True).items()}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        moments.check(Moments.of({name.removeprefix(CHANGE): one for name, one in tensors.items()}), MOST_RECORDS)

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return range(1)


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
        features, state = self.features(tensors, client, device)
        held_out = is_held_out(len(features))
        if self.last:
            counts = count(self.method.surprise(features[held_out], state))
            return Response({CHANGE + NOVELTY: counts}, Reply())
        sums = self.method.observe(features[~held_out], state)
        return Response({CHANGE + name: value for name, value in sums.items()}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        if self.last:
            return {CHANGE + NOVELTY: (torch.Size([BINS]), torch.int64)}
        specs = self.method.sums(self.members, self.starts, self.size)
        return {CHANGE + name: spec for name, spec in specs.items()}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        self.check_sums({name.removeprefix(CHANGE): tensor for name, tensor in tensors.items()})

    def check_sums(self, sums: dict[str, Tensor]) -> None:
        """Refuses sums that no clients have, by name without ``change/``.

        Raises:
            WireError: says what is out of range.
        """
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
        starts = 1 if self.last or config.pool is None else config.pool.starts
        return "pool.starts" if self.starts != starts else super().beyond(job)
