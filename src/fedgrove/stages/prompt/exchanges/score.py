"""Every client scores the same candidate prompts on its own records; the server adds the scores up."""

from __future__ import annotations

from typing import ClassVar

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.prompt.config import Config, Population
from fedgrove.stages.prompt.records import MOST_WEIGHT
from fedgrove.stages.prompt.requests import CANDIDATES, PromptRequest
from fedgrove.stages.prompt.scoring import BITS, MOST_LOSS, sums

SCORES, COUNTS = CHANGE + "scores", CHANGE + "counts"


class ScorePrompts(PromptRequest):
    """Score candidate prompts on records of yours, and sum each candidate's scores.

    Tensors of the request: ``candidates``, (candidates, dimension) float32 or (candidates, tokens) int32. The response
    contains, in int64, ``change/scores`` (candidates,): losses in multiples of 2⁻²⁰ nats or right labels, each times its
    record's weight; and ``change/counts`` (4,): the weight of the records that are in them, how many these are, how many were
    skipped because no loss was finite, and how many scores were computed (a candidate that is there twice is computed once), or
    how many requests an endpoint was sent for them.

    Attributes:
        candidates: how many.
    """

    KIND: ClassVar[str] = "prompt/score"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.PROMPT_SCORES})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset()

    candidates: Population

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        decoder, records = self.decoder(client, device), self.drawn(client)
        candidates = self.check_candidates(tensors.get(CANDIDATES), decoder, client)
        if len(candidates) != self.candidates:
            raise client.error("another number of candidate prompts came than the request says; refused")
        different, places = torch.unique(candidates, dim=0, return_inverse=True)
        scorer = self.scorer(client, decoder)
        found = sums(scorer(different, records), records, self.score)
        counts = torch.tensor([found.weight, found.records, found.skipped, scorer.calls])
        return Response({SCORES: found.scores[places], COUNTS: counts}, Reply())

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if config.searches_alone and self.round < config.rounds:
            return "round"
        return "candidates" if self.candidates > config.candidates_in(self.round) else super().beyond(job)

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        return {SCORES: (torch.Size([self.candidates]), torch.int64), COUNTS: (torch.Size([4]), torch.int64)}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        self.check_sums(tensors, 1)

    def check_sums(self, tensors: Tensors, clients: int) -> None:
        """Refuses sums over this many clients that no records have.

        Raises:
            WireError: there are more records than were asked for, or scores are larger than they allow.
        """
        weight, records, skipped, calls = tensors[COUNTS].tolist()
        if min(records, skipped) < 0 or records + skipped > clients * self.records:
            raise WireError("its numbers of records are out of range")
        if not records <= weight <= clients * MOST_WEIGHT or (weight and not records):
            raise WireError("the weight of its records is out of range")
        if not 0 <= calls <= self.most_calls(records + skipped, self.candidates):
            raise WireError("it computed more scores than there are records and candidates")
        largest = weight if self.score == "correct" else round(weight * MOST_LOSS * 2**BITS)
        if bool(((tensors[SCORES] < 0) | (tensors[SCORES] > largest)).any()):
            raise WireError("its scores are larger than its records allow")
