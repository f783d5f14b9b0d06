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
from fedgrove.rounds.request import Response, Tensors
from fedgrove.stages.head.config import MAX_GUESSES, Config
from fedgrove.stages.head.exchanges.moments import SumMoments
from fedgrove.stages.head.heads import Linear
from fedgrove.stages.head.records import NO_LABEL
from fedgrove.stages.head.requests import HeadIn

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


class SumGuesses(SumMoments, HeadIn):
    """Guess the labels of your records that have none, and sum the features of those that are guessed most clearly.

    The response is that of ``head/moments``.

    Attributes:
        exchange: from 1.
    """

    KIND: ClassVar[str] = "head/guesses"
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage", "exchange")

    exchange: Annotated[int, Field(ge=1, le=MAX_GUESSES)]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        records = self.records(tensors, client, device)
        states = records.states[records.classes == NO_LABEL]
        self.check_number(len(states), client)
        guessed, chosen = guess(*self.head_in(tensors, states.shape[1], client), states)
        return self.sums(records.features.of(states[chosen]), guessed[chosen])

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if self.exchange > config.guesses:
            return "guesses"
        return super().beyond(job)
