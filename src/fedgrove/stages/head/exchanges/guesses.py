"""Clients whose records have no labels add those whose labels the head guesses most clearly; at the end each keeps a head.

Self-training, as clients do in *DualAdapt* (arXiv 2108.07792, WACV 2022), whose full text and code we did not have. Ours:
guesses become sums, which are added as those of labels are, and heads of two halves; see :mod:`fedgrove.stages.head.halves`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Label, Line
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors
from fedgrove.rounds.wire import WireError
from fedgrove.stages.head.config import MAX_GUESSES, Config
from fedgrove.stages.head.exchanges.moments import SumMoments
from fedgrove.stages.head.files import write_head
from fedgrove.stages.head.halves import HALVES, guess, half_of, named
from fedgrove.stages.head.heads import Linear
from fedgrove.stages.head.records import NO_LABEL
from fedgrove.stages.head.requests import HeadRequest

WEIGHT, BIAS, FREQUENCIES = "weight", "bias", "frequencies"  # tensors of a request, after a prefix
BEFORE, AFTER = "before", "after"

Classes = Annotated[tuple[Label, ...], Field(min_length=2, max_length=1000)]
Number = Annotated[int, Field(ge=0, le=2**40)]


def head_tensors(prefix: str, head: Linear) -> Tensors:
    """A head of hidden states as tensors of a request."""
    return {f"{prefix}/{WEIGHT}": head.weight.float(), f"{prefix}/{BIAS}": head.bias.float()}


class HeadOf(HeadRequest):
    """A request that brings heads; for subclasses."""

    def head_in(
        self, tensors: Tensors, prefix: str, classes: Classes, states: int, client: LocalClient
    ) -> tuple[Linear, Tensor]:
        """A head of the request, and the indices of its labels.

        Raises:
            FedgroveError: it is missing, or has another shape or dtype.
        """
        weight, bias = tensors.get(f"{prefix}/{WEIGHT}"), tensors.get(f"{prefix}/{BIAS}")
        if weight is None or weight.shape != (len(classes), states) or weight.dtype != torch.float32:
            raise client.error("the weight of a head that came has another shape or dtype; refused")
        if bias is None or bias.shape != (len(classes),) or bias.dtype != torch.float32:
            raise client.error("the bias of a head that came has another shape or dtype; refused")
        return Linear(weight.double(), bias.double()), torch.tensor([self.labels.index(label) for label in classes])

    def strange(self, classes: tuple[Classes, ...], config: Config) -> str | None:
        """Which key the labels of the heads do not keep to."""
        known = all(set(one) <= set(config.labels) and len(set(one)) == len(one) for one in classes)
        return None if known else "labels"


class SumGuesses(SumMoments, HeadOf):
    """Guess the labels of your records that have none, and sum the features of those that are guessed most clearly.

    Each half of the records is guessed by the head of the other half. The response is that of ``head/moments``. Tensors of the
    request, besides those of :class:`~fedgrove.stages.head.requests.HeadRequest`: for each half ``0/weight`` (classes, hidden
    states) and ``0/bias`` (classes,) float32.

    Attributes:
        exchange: from 1.
        classes: the labels of each half's head.
    """

    KIND: ClassVar[str] = "head/guesses/sum"
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage", "exchange")

    exchange: Annotated[int, Field(ge=1, le=MAX_GUESSES)]
    classes: tuple[Classes, Classes]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        records = self.records(tensors, client, device)
        unlabeled, halves = records.classes == NO_LABEL, half_of(len(records.classes))
        if int(unlabeled.sum()) > self.limit:
            raise client.error(f"it has {int(unlabeled.sum())} records, but at most {self.limit} can be summed")
        parts = []
        for half in range(HALVES):
            states = records.states[unlabeled & (halves == half)]
            other = HALVES - 1 - half
            head, places = self.head_in(tensors, str(other), self.classes[other], states.shape[1], client)
            guessed, chosen = guess(head, places, states)
            parts.append(self.sums(records.features.of(states[chosen]), guessed[chosen]))
        return Response({CHANGE + name: tensor for name, tensor in named(parts).items()}, Reply())

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if self.exchange > config.guesses:
            return "guesses"
        return self.strange(self.classes, config) or super().beyond(job)


class Kept(Reply):
    """On how many of a client's records without labels the heads of the two halves agree; None: not said.

    Attributes:
        records: without labels.
        before, after: the agreement before and after guesses.
    """

    records: Number | None = None
    before: Number | None = None
    after: Number | None = None


class KeepHead(HeadOf):
    """Keep the head with guesses if the heads of two halves agree more on your records with guesses; else that from labels.

    It is written to ``personal/stage-N`` of the client's folder, and never sent. Tensors of the request, besides those of
    :class:`~fedgrove.stages.head.requests.HeadRequest`: ``before`` and ``after`` guesses the head of all and that of each half,
    such as ``before/weight`` and ``after/1/bias``, and ``before/frequencies`` and ``after/frequencies`` (classes,) float64.

    Attributes:
        classes: the labels of the heads of all, before and after.
        before, after: those of each half.
        says: whether the reply says how often they agree.
        base, title: for the card of the client's head.
    """

    KIND: ClassVar[str] = "head/guesses/keep"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.AGREEMENTS})
    REPLY: ClassVar[type[Reply]] = Kept

    classes: tuple[Classes, Classes]
    before: tuple[Classes, Classes]
    after: tuple[Classes, Classes]
    says: bool
    base: Line
    title: Line

    def discloses(self) -> frozenset[Disclosure]:
        return self.DISCLOSES if self.says else frozenset()

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        records = self.records(tensors, client, device)
        states = records.states[records.classes == NO_LABEL].double()
        agreements = []
        for when, classes in ((BEFORE, self.before), (AFTER, self.after)):
            found = []
            for half in range(HALVES):
                head, places = self.head_in(tensors, f"{when}/{half}", classes[half], states.shape[1], client)
                found.append(places[(states @ head.weight.T + head.bias).argmax(1)])
            agreements.append(int((found[0] == found[1]).sum()))
        chosen = int(agreements[1] > agreements[0])
        kept, labels = (BEFORE, AFTER)[chosen], self.classes[chosen]
        head, _ = self.head_in(tensors, kept, labels, states.shape[1], client)
        frequencies = tensors.get(f"{kept}/{FREQUENCIES}")
        if frequencies is None or frequencies.shape != (len(labels),) or frequencies.dtype != torch.float64:
            raise client.error("the frequencies of the labels that came have another shape or dtype; refused")
        folder = client.folder / "personal" / f"stage-{self.stage}"
        write_head(folder, self, head, labels, frequencies, self.base, self.title)
        said = {"records": len(states), "before": agreements[0], "after": agreements[1]} if self.says else {}
        return Response({}, Kept(**said))

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Kept)
        numbers = (reply.records, reply.before, reply.after)
        if any((number is not None) != self.says for number in numbers):
            raise WireError("it says more or less about its records than was asked")
        if max(reply.before or 0, reply.after or 0) > (reply.records or 0):
            raise WireError("its heads agree on more records than it has")

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if not config.guesses:
            return "guesses"
        if self.says and job.secure:
            return "says"
        return self.strange((*self.classes, *self.before, *self.after), config) or super().beyond(job)
