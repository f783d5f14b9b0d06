"""Every client compares three heads on records that it held out: that of all, its own form of it, and one from its own records.

Its own form is the head of all with the frequencies of the client's own labels, by Bayes' rule. The client keeps it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Line, Positive
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.rounds.request import Disclosure, Reply, Response, Tensors
from fedgrove.rounds.wire import WireError
from fedgrove.stages.head.config import Config
from fedgrove.stages.head.files import write_head
from fedgrove.stages.head.heads import Linear
from fedgrove.stages.head.requests import HeadIn
from fedgrove.stages.head.solving import TooFew, solve

FREQUENCIES = "frequencies"  # a tensor of a request, besides the head of all

Correct = Annotated[int, Field(ge=0, le=2**40)]


class Compared(Reply):
    """On how many of its held-out records each head finds the label.

    Attributes:
        records: held out; 0: none.
        shared: with the head of all; personal: with the same for the client's own frequencies of labels.
        own: with the head from the client's own records; None: there are too few.
    """

    records: Correct
    shared: Correct = 0
    personal: Correct = 0
    own: Correct | None = None


class CompareHeads(HeadIn):
    """Compare the head of all, its form for your own labels, and a head from your own records, on records that you held out.

    The form for the client's own labels is written to ``personal/stage-N`` of its folder; it is never sent. Tensors of the
    request, besides those of :class:`~fedgrove.stages.head.requests.HeadIn`: ``frequencies`` (classes,) float64.

    Attributes:
        ridge: for the head from the client's own records.
        base, title: for the card of the client's head.
    """

    KIND: ClassVar[str] = "head/personal"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.HELD_OUT_ACCURACIES})
    REPLY: ClassVar[type[Reply]] = Compared

    ridge: Positive
    base: Line
    title: Line

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        records = self.records(tensors, client, device)
        shared, places = self.head_in(tensors, records.states.shape[1], client)
        frequencies = self._frequencies(tensors, client)
        kept, held_out = ~records.held_out, records.held_out
        of = records.features.of(records.states[kept])
        moments = Moments.over(of, records.classes[kept], len(self.labels), self.method.PRODUCTS)
        counts = moments.counts[places].double()
        own_frequencies = (counts + frequencies) / (counts.sum() + 1)  # as if one record were the federation's
        personal = self.method.reweigh(shared, frequencies, own_frequencies)
        write_head(
            client.folder / "personal" / f"stage-{self.stage}",
            self,
            personal,
            self.classes,
            own_frequencies,
            self.base,
            self.title,
        )
        if not bool(held_out.any()):
            return Response({}, Compared(records=0))
        states, truth = records.states[held_out].double(), records.classes[held_out]

        def correct(linear: Linear, labels: Tensor) -> int:
            scores = states @ linear.weight.double().T + linear.bias.double()
            return int((labels[scores.argmax(1)] == truth).sum())

        own = None
        present = moments.counts.nonzero().squeeze(1)
        if len(present) == 1:
            own = int((truth == present[0]).sum())
        else:
            with suppress(TooFew):
                linear, present = solve(moments, self.head, self.ridge, self.labels)
                own = correct(Linear(*records.features.unfold(linear.weight, linear.bias)), present)
        found = [correct(linear, places) for linear in (shared, personal)]
        return Response({}, Compared(records=len(truth), shared=found[0], personal=found[1], own=own))

    def _frequencies(self, tensors: Tensors, client: LocalClient) -> Tensor:
        """The frequencies of the head's labels, as they came.

        Raises:
            FedgroveError: they are missing, have another shape or dtype, or one is not positive.
        """
        frequencies = tensors.get(FREQUENCIES)
        if frequencies is None or frequencies.shape != (len(self.classes),) or frequencies.dtype != torch.float64:
            raise client.error("the frequencies of the labels that came have another shape or dtype; refused")
        if bool((frequencies <= 0).any()):
            raise client.error("the frequencies of the labels that came are not positive; refused")
        return frequencies

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Compared)
        if max(reply.shared, reply.personal, reply.own or 0) > reply.records:
            raise WireError("it claims more right answers than records")

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if not config.personal:
            return "personal"
        return "ridge" if self.ridge != config.ridge else super().beyond(job)
