"""Clients whose records have no labels add those whose labels the head guesses most clearly.

Self-training, as clients do in *DualAdapt* (arXiv 2108.07792, WACV 2022), whose full text and code we did not have. Ours:
guesses become sums, which are added as those of labels are.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Label
from fedgrove.rounds.request import Response, Tensors
from fedgrove.stages.head.config import MAX_GUESSES, Config
from fedgrove.stages.head.exchanges.moments import SumMoments
from fedgrove.stages.head.heads import Linear
from fedgrove.stages.head.records import NO_LABEL

WEIGHT, BIAS = "weight", "bias"  # tensors of a request: the head of all, of hidden states
FEWEST = 3  # guesses of a label whose sum is sent: one record's features are not to be seen


def guess(head: Linear, classes: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that a head guesses, and for which records it does so most clearly.

    Of each label the clearer half of its records is chosen, not all records beyond one threshold: else labels that are easy to
    guess would take everything. A label that has fewer than ``FEWEST`` of them gets none.

    Args:
        head: of hidden states.
        classes: (classes,) int64: the indices of its labels.
        states: (records, hidden states).

    Returns:
        (records,) int64 indices of labels, and (records,) bool.
    """
    scores = states.double() @ head.weight.T + head.bias
    best = scores.topk(2, 1).values
    clearness, guessed = best[:, 0] - best[:, 1], classes[scores.argmax(1)]
    chosen = torch.zeros(len(states), dtype=torch.bool)
    for label in classes.tolist():
        places = (guessed == label).nonzero().squeeze(1)
        number = -(-len(places) // 2)
        if number >= FEWEST:
            chosen[places[clearness[places].argsort(descending=True, stable=True)[:number]]] = True
    return guessed, chosen


class SumGuesses(SumMoments):
    """Guess the labels of your records that have none, and sum the features of those that are guessed most clearly.

    The response is that of ``head/moments``. Tensors of the request, besides those of
    :class:`~fedgrove.stages.head.requests.HeadRequest`: ``weight`` (classes, hidden states) and ``bias`` (classes,) float32.

    Attributes:
        exchange: from 1.
        classes: the labels of the head.
    """

    KIND: ClassVar[str] = "head/guesses"
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage", "exchange")

    exchange: Annotated[int, Field(ge=1, le=MAX_GUESSES)]
    classes: Annotated[tuple[Label, ...], Field(min_length=2, max_length=1000)]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        records = self.records(tensors, client, device)
        states = records.states[records.classes == NO_LABEL]
        if len(states) > self.limit:
            raise client.error(f"it has {len(states)} records, but at most {self.limit} can be summed")
        number, width = len(self.classes), states.shape[1]
        given = [tensors.get(name) for name in (WEIGHT, BIAS)]
        if [(of.shape, of.dtype) for of in given if of is not None] != [
            ((number, width), torch.float32),
            ((number,), torch.float32),
        ]:
            raise client.error("the head that came has another shape or dtype; refused")
        head = Linear(tensors[WEIGHT].double(), tensors[BIAS].double())
        guessed, chosen = guess(head, torch.tensor([self.labels.index(label) for label in self.classes]), states)
        return self.sums(records.features.of(states[chosen]), guessed[chosen])

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if self.exchange > config.guesses:
            return "guesses"
        if not set(self.classes) <= set(config.labels) or len(set(self.classes)) < len(self.classes):
            return "labels"
        return super().beyond(job)
