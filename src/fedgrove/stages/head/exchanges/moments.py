"""Every client sums moments of its labeled records; the server adds the sums up and solves the head."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.models.blocks import Decoder
from fedgrove.models.features import width
from fedgrove.rounds.aggregator.moments import Moments, check, specs
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.stages.head.records import NO_LABEL
from fedgrove.stages.head.requests import HeadRequest


class SumMoments(HeadRequest):
    """Sum, over your labeled records, the features and their squares and products.

    The response holds int64: ``change/counts`` (labels,), ``change/sums`` (labels, features), ``change/squares`` (features,)
    and, if the head needs them, ``change/products``; see :class:`~fedgrove.rounds.aggregator.moments.Moments`.
    """

    KIND: ClassVar[str] = "head/moments"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.LABEL_SUMS, Disclosure.FEATURE_PRODUCTS})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset()
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage",)

    def discloses(self) -> frozenset[Disclosure]:
        return self.DISCLOSES if self.method.PRODUCTS else self.DISCLOSES - {Disclosure.FEATURE_PRODUCTS}

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        records = self.records(tensors, client, device)
        kept = ~records.held_out & (records.classes != NO_LABEL)
        self.check_number(int(kept.sum()), client)
        return self.sums(records.features.of(records.states[kept]), records.classes[kept])

    def check_number(self, records: int, client: LocalClient) -> None:
        """Refuses more records than may be summed."""
        if records > self.limit:
            raise client.error(f"it has {records} records, but at most {self.limit} can be summed")

    def sums(self, features: Tensor, classes: Tensor) -> Response:
        """The response for records with these features and labels."""
        moments = Moments.over(features, classes, len(self.labels), self.method.PRODUCTS)
        return Response({CHANGE + name: tensor for name, tensor in moments.tensors().items()}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        number = width(layout, self.layers)
        number = number if self.size is None else min(number, self.size)
        of = specs(len(self.labels), number, self.method.PRODUCTS)
        return {CHANGE + name: spec for name, spec in of.items()}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        check(Moments.of({name.removeprefix(CHANGE): tensor for name, tensor in tensors.items()}), self.limit)
