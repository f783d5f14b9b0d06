"""Every client edits the words of a prompt on its own records, and votes for those that it came to; the votes are summed."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Count
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.prompt.candidates import WORDS
from fedgrove.stages.prompt.config import MOST_WORDS, Config, Population, PromptLength
from fedgrove.stages.prompt.lexicon import lexicon_of
from fedgrove.stages.prompt.methods import Alone, Task, VotingMethod, voting_method_of
from fedgrove.stages.prompt.requests import PromptRequest
from fedgrove.stages.prompt.scoring import costs, sums

VOTES, PLACES, CALLS = CHANGE + "votes", CHANGE + "places", CHANGE + "calls"
Words = Annotated[int, Field(ge=2, le=MOST_WORDS)]


class VoteForWords(PromptRequest):
    """Edit a prompt of words of a given list by what helps on records of yours, and vote for the words that it has then.

    Tensors of the request: see ``share`` of the method. The response contains ``change/votes`` (words,) int32: 1 for a word of
    the prompt; ``change/places`` (words,) int32: the word's place in it, from 0; and ``change/calls`` (1,) int64: how many
    scores were computed, or how many requests an endpoint was sent for them. A client none of whose records has a finite loss
    votes for nothing.

    Attributes:
        population, generations: as in the job.
        tokens: places of a prompt.
        words: how many are in the list.
    """

    KIND: ClassVar[str] = "prompt/votes"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.PROMPT_WORDS})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset()

    population: Population
    generations: Count
    tokens: PromptLength
    words: Words

    @property
    def searcher(self) -> VotingMethod:
        """The module of the method."""
        return voting_method_of(self.method)

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        task = Task(self.seed, self.population, self.tokens, words=((0,),) * self.words)
        decoder, records = self.decoder(client, device), self.drawn(client, "/edits")
        if not self.searcher.fits(tensors, task):
            raise client.error("the prompt or the list of words that came has another shape, dtype or size; refused")
        lexicon = lexicon_of(tensors[WORDS], decoder, client)
        scorer = self.scorer(client, decoder)
        is_usable = True

        def scored(candidates: Tensor) -> list[float]:
            nonlocal is_usable
            found = sums(scorer(candidates, records), records, self.score)
            is_usable = is_usable and found.records > 0
            return costs(found.scores, found.weight, self.score) if found.records else [0.0] * len(candidates)

        alone = Alone(f"{self.seed}/{self.round}/edits", self.population, self.generations, 1.0)
        votes, places = self.searcher.vote(tensors, alone, self.tokens, lexicon, scored)
        votes, places = votes * is_usable, places * is_usable
        return Response({VOTES: votes, PLACES: places, CALLS: torch.tensor([scorer.calls])}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        of_words = (torch.Size([self.words]), torch.int32)
        return {VOTES: of_words, PLACES: of_words, CALLS: (torch.Size([1]), torch.int64)}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        self.check_sums(tensors, 1)
        places = tensors[PLACES][tensors[VOTES] > 0].sort().values
        if not torch.equal(places, torch.arange(len(places), dtype=places.dtype)):
            raise WireError("its words do not have a place each")

    def check_sums(self, tensors: Tensors, clients: int) -> None:
        """Refuses sums over this many clients that no prompts have.

        Raises:
            WireError: there are more votes than clients or places, or words are where no prompt has a place.
        """
        votes, places, calls = tensors[VOTES].long(), tensors[PLACES].long(), int(tensors[CALLS])
        if bool(((votes < 0) | (votes > clients)).any()) or int(votes.sum()) > clients * self.tokens:
            raise WireError("it has more votes than a prompt has places")
        if bool(((places < 0) | (places > votes * (self.tokens - 1))).any()):
            raise WireError("its words are where a prompt has no places")
        if not 0 <= calls <= self.most_calls(clients * self.records, self.generations * self.population + 1):
            raise WireError("it computed more scores than there are records and edits")

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if not config.votes:
            return "aggregation"
        for key in ("population", "generations"):
            if getattr(self, key) != getattr(config, key):
                return key
        if self.round >= config.rounds:
            return "round"
        if self.tokens > config.most_places():
            return "tokens"
        return "words" if self.words > config.choices else super().beyond(job)
