"""Every client searches for a prompt on its own records alone; the server combines what they came to. As published."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Count, CountOrZero, Fraction, NonNegative, Positive
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.prompt.config import Config, Population, PromptLength, Records
from fedgrove.stages.prompt.methods import Alone, LocalMethod, Task, local_method_of
from fedgrove.stages.prompt.records import MOST_WEIGHT
from fedgrove.stages.prompt.requests import LARGEST, PromptRequest
from fedgrove.stages.prompt.scoring import MOST_LOSS, costs, losses, ratios, sums


class Searched(Reply):
    """The reply of a client that searched alone.

    Attributes:
        records: that it searched on.
        weight: of these, see :func:`~fedgrove.stages.prompt.records.records_of`.
        skipped: that it drew, and whose loss was not finite under the prompt that it came to.
        cost: of that prompt, the mean over the records.
        calls: how many scores it computed, or how many requests an endpoint was sent for them.
    """

    records: Records
    weight: Annotated[int, Field(ge=1, le=MOST_WEIGHT)]
    skipped: CountOrZero
    cost: NonNegative
    calls: Annotated[int, Field(ge=0, le=2**50)]


class SearchAlone(PromptRequest):
    """Search for a prompt on records of yours alone, from where the server is, and send what you came to with its loss.

    Tensors of the request and, as ``change/NAME``, of the response: see ``share`` and ``specs`` of the method.

    Attributes:
        population, generations, learning_rate, against_overfitting: as in the job.
        tokens: of a prompt.
        words: how many a prompt chooses from; 0: the method has no words.
    """

    KIND: ClassVar[str] = "prompt/local"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.OWN_PROMPTS})
    REPLY: ClassVar[type[Reply]] = Searched

    population: Population
    generations: Count
    learning_rate: Positive
    against_overfitting: Fraction
    tokens: PromptLength
    words: CountOrZero

    @property
    def searcher(self) -> LocalMethod:
        """The module of the method."""
        return local_method_of(self.method)

    def task(self) -> Task:
        """The sizes of what is searched in."""
        dimension = self.subspace.dimension if self.subspace else 2
        return Task(self.seed, self.population, self.tokens, dimension, (), ((0,),) * self.words)

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        if not self.searcher.fits(tensors, self.task()):
            raise client.error("where its search would begin has another shape, dtype or size; refused")
        decoder, records = self.decoder(client, device), self.drawn(client)
        own_seed = f"{self.seed}/{self.round}/{client.name}"
        vocabulary = decoder.checkpoint.config.get_text_config().vocab_size
        spoilt = records.spoilt(self.against_overfitting, vocabulary, own_seed) if self.against_overfitting else None
        scorer = self.scorer(client, decoder)

        def scored(candidates: Tensor) -> tuple[list[float], dict[str, int]]:
            """The mean cost of candidates, and what it is the mean of."""
            if self.subspace is not None and not self.subspace.reaches(candidates):
                raise client.error("its own search for a prompt diverged", "try fewer generations, or a smaller spread")
            self.check_candidates(candidates, decoder, client)
            scores = scorer(candidates, records)
            if spoilt is not None:
                of = ratios(losses(scores, records), losses(scorer(candidates, spoilt), spoilt))
                counted = {"records": len(records), "weight": sum(records.weights), "skipped": 0}
                return of.mean(0).tolist(), counted
            found = sums(scores, records, self.score)
            if not found.records:
                raise client.error("no record's loss is finite under any prompt", 'try model.dtype = "float32"')
            counted = {name: getattr(found, name) for name in ("records", "weight", "skipped")}
            return costs(found.scores, found.weight, self.score), counted

        alone = Alone(own_seed, self.population, self.generations, self.learning_rate)
        found, candidate = self.searcher.search(tensors, alone, lambda candidates: scored(candidates)[0])
        (cost,), counted = scored(candidate)
        return Response(
            {CHANGE + name: tensor for name, tensor in found.items()},
            Searched(**counted, cost=cost, calls=scorer.calls),
        )

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        return {CHANGE + name: spec for name, spec in self.searcher.specs(self.task(), self.generations).items()}

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Searched)
        if reply.records + reply.skipped > self.records:
            raise WireError("it searched on more records than were asked for")
        if not self.against_overfitting and reply.cost > MOST_LOSS:
            raise WireError("its cost is larger than the largest loss")

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        if any(bool((tensor.abs() > LARGEST).any()) for tensor in tensors.values()):
            raise WireError("what it came to is out of range")

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if not config.searches_alone:
            return "aggregation"
        for key in ("population", "generations", "learning_rate", "against_overfitting"):
            if getattr(self, key) != getattr(config, key):
                return key
        if self.round >= config.rounds:
            return "round"
        if self.subspace is not None and self.tokens != len(self.subspace.base):
            return "tokens"
        if self.words > (config.choices if self.subspace is None else 0):
            return "words"
        return super().beyond(job)
