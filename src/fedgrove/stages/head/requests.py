"""What both requests of a head stage have in common: which records become which features."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import decoder_of
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Count, HeldOut, Label, Length, Name, Word
from fedgrove.models.features import Features, projection, width
from fedgrove.rounds.aggregator.moments import MOST_RECORDS
from fedgrove.rounds.request import Request, Tensors
from fedgrove.stages.head.config import MAX_GUESSES, Config, Labels, Layers
from fedgrove.stages.head.heads import Head, Linear, head_of
from fedgrove.stages.head.records import NO_LABEL, hold_out, states_of

CENTER, SCALE = "center", "scale"  # tensors of a request, see Features
WEIGHT, BIAS = "weight", "bias"  # tensors of a request that brings a head, of hidden states
OF_JOB = ("head", "labels", "layers", "pool", "length", "size", "personal", "guesses")  # fields of a request: as in the job


class Records(NamedTuple):
    """A client's records.

    Attributes:
        states: (records, hidden states) float32.
        classes: (records,) int64, the index of each label, or ``NO_LABEL``.
        held_out: (records,) bool.
        features: how states become features.
    """

    states: Tensor
    classes: Tensor
    held_out: Tensor
    features: Features


class HeadRequest(Request):
    """A request about a client's labeled records.

    Tensors sent with the request: ``center`` and ``scale``, (hidden states,) float32.

    Attributes:
        head: the name of the head.
        labels, layers, pool, length, size: as in the job.
        seed: of the stage, for the projection.
        personal: the fraction of its records that the client holds out.
        guesses: as in the job; 0: a client without labels is an error.
        limit: the most records that may be summed.
    """

    head: Name
    labels: Labels
    layers: Layers
    pool: Literal["mean", "last"]
    length: Length
    size: Count | None
    seed: Word
    personal: HeldOut
    guesses: Annotated[int, Field(ge=0, le=MAX_GUESSES)] = 0
    limit: Annotated[int, Field(ge=1, le=MOST_RECORDS)]

    @property
    def method(self) -> Head:
        """The module of the head."""
        return head_of(self.head)

    def records(self, tensors: Tensors, client: LocalClient, device: str) -> Records:
        """The client's records.

        Raises:
            FedgroveError: its records have no labels or cannot be read, or the request does not fit its model.
        """
        decoder = decoder_of(client, device)
        if not all(-len(decoder) - 1 <= layer <= len(decoder) for layer in self.layers):
            raise client.error(f"its model has {len(decoder)} blocks, but the request names other layers; refused")
        number = width(decoder, self.layers)
        given = [tensors.get(name) for name in (CENTER, SCALE)]
        if any(one is None or one.shape != (number,) or one.dtype != torch.float32 for one in given):
            raise client.error("the center and scale of its features have another shape or dtype; refused")
        center, scale = tensors[CENTER], tensors[SCALE]
        if bool((scale <= 0).any()):
            raise client.error("the scale of its features is not positive; refused")
        states, classes = states_of(client, self.labels, self.layers, self.pool, self.length, device, self.guesses > 0)
        if not bool(torch.isfinite(states).all()):
            raise client.error("the hidden states of its records are not finite", 'try model.dtype = "float32"')
        matrix = projection(number, self.size, self.seed)
        held_out = hold_out(classes, self.personal) & (classes != NO_LABEL)
        return Records(states, classes, held_out, Features(self.layers, self.pool, center, scale, matrix))

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        for key in OF_JOB:
            if getattr(self, key) != getattr(config, key):
                return key
        if self.seed != job.seed_of(self.stage):
            return "seed"
        # a client that has more records than it may sum fails, and the server sees that: a chosen limit would be a question
        return None if self.limit in {MOST_RECORDS // number for number in range(1, len(job.clients) + 1)} else "limit"


class HeadIn(HeadRequest):
    """A request that brings a head of hidden states: ``weight`` (classes, hidden states) and ``bias`` (classes,) float32.

    Attributes:
        classes: the labels of the head: those that have records.
    """

    classes: Annotated[tuple[Label, ...], Field(min_length=2, max_length=1000)]

    def head_in(self, tensors: Tensors, states: int, client: LocalClient) -> tuple[Linear, Tensor]:
        """The head, float64, and the indices of its labels.

        Raises:
            FedgroveError: a tensor is missing, or has another shape or dtype.
        """
        for name, shape in ((WEIGHT, (len(self.classes), states)), (BIAS, (len(self.classes),))):
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != shape or tensor.dtype != torch.float32:
                raise client.error("the head that came has another shape or dtype; refused")
        places = torch.tensor([self.labels.index(label) for label in self.classes])
        return Linear(tensors[WEIGHT].double(), tensors[BIAS].double()), places

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if not set(self.classes) <= set(config.labels) or len(set(self.classes)) < len(self.classes):
            return "labels"
        return super().beyond(job)
