"""``[[stages]]`` of ``kind = "prompt"``: the keys of a stage that looks for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from fedgrove import plugins
from fedgrove.job.endpoint import LogProbs
from fedgrove.job.stage_config import StageConfig
from fedgrove.job.units import ComputeDtype, Count, File, Fraction, Length, Positive, method_of
from fedgrove.stages.prompt.methods import (
    PACKAGE,
    LocalMethod,
    Method,
    VotingMethod,
    local_method_of,
    method_of_name,
    voting_method_of,
)

if TYPE_CHECKING:
    from fedgrove.job.tables import Job

MOST_CANDIDATES = 1024  # of a round
MOST_TOKENS = 512  # of a prompt
MOST_DIMENSIONS = 4096  # of the subspace of soft prompts
MOST_RECORDS = 2**20  # of a client in a round
MOST_WORDS = 4096  # of a list that clients vote for words of
TOKENS = 8  # of a prompt without a start
ALONE = ("local", "mean")  # values of the key aggregation with which clients search alone
VOTES = "votes"  # the value with which they vote for words
DEFAULTS: dict[str, dict[str, Any]] = {  # by aggregation, where they differ
    **{key: {"population": 5} for key in ALONE},
    VOTES: {"population": 5, "choices": 1024, "score": "correct"},
}
FINALISTS = 4  # at most so many candidates are compared after the last round


def _printable(text: str) -> str:
    if not text.replace("\n", "").isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


Written = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_printable)]  # with its spaces and line breaks
Labels = Annotated[tuple[Written, ...], Field(max_length=200)]
Population = Annotated[int, Field(ge=1, le=MOST_CANDIDATES)]
PromptLength = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Dimension = Annotated[int, Field(ge=2, le=MOST_DIMENSIONS)]
Records = Annotated[int, Field(ge=1, le=MOST_RECORDS)]
Score = Literal["loss", "correct"]
Place = Literal["end", "front"]


def unfit(logprobs: LogProbs, soft: bool, score: str, labels: Sequence[str]) -> tuple[str, str] | None:
    """What is wrong with a stage for a client whose model runs at an endpoint, and the remedy; None: nothing.

    Args:
        logprobs: what the endpoint returns.
        soft: whether candidates are soft prompts.
    """
    if soft:
        return "an endpoint takes text, and a soft prompt is none", 'take method = "categories", or no endpoint'
    if logprobs == "none" and score != "correct":
        return "an endpoint without log-probabilities tells no loss", 'set score = "correct", or see endpoint.logprobs'
    if logprobs == "next" and not labels:
        return (
            "an endpoint that returns the most likely next tokens alone tells no loss of a free answer",
            'give labels, or an endpoint with logprobs = "echo"',
        )
    return None


class Config(StageConfig):
    """``[[stages]]`` of ``kind = "prompt"``: a prompt for the frozen model, beside it in ``RUN/prompt``.

    The server names candidates, every client scores the same ones on its own records, and the scores are summed. A record's
    text is what ``prompt`` of its client makes of it, and ``answer`` is what should follow the prompt that is found.

    Attributes:
        kind: what the stage does.
        method: how candidates are made: "evolution" (soft prompts in a random subspace, by CMA-ES), "categories" (words, by
            policy gradient) or "tokens" (words that clients edit and vote for).
        aggregation: "pooled": each round's candidates are the server's, and their scores are summed over all clients. "local":
            every client searches on its own records, as published, and the server combines what they came to. "mean": likewise,
            and the server takes the plain mean. Only "evolution" has all three; "categories" takes the mean for "local".
            "votes", of "tokens" alone: every client edits the prompt on its own records and votes for its words; the votes are
            summed, and of the old prompt and what the server merges the one that all clients score best stays.
        rounds: how often candidates are scored. After the last, up to four are compared once more, on more records.
        population: candidates of a round; where clients search alone or edit, of each of their generations. Default: 20, and 5.
        records: of each client in a round, drawn anew in every round; all candidates are scored on the same ones.
        labels: all possible answers, written exactly as the answers, spaces included. The loss is then the cross entropy among
            them. Default: answers are free text, and the loss is that of an answer's tokens, their mean.
        score: "loss", or "correct": how many records get the right label. Default: "loss", and "correct" for votes.
        compute_dtype: the dtype in which clients score prompts: "float32"; "bfloat16", faster on CPUs with instructions for it,
            with losses that are less exact; or "auto", which is "bfloat16" on such a CPU (clients may then differ). Default:
            "float32" on a CPU, the model's own dtype on a GPU.
        place: of the prompt. "end": after the record's text, so that a text passes through the model once for all candidates.
            "front": before it, where peft's prompt tuning has it.
        length: tokens of a record's text with its answer; a longer text is cut off from the left.
        tokens: of the prompt; of prompts made of words, how many words at most. Default: those of ``start``, else 8.
        start: a written prompt to begin with and to compare with.
        dimension: of the random subspace. Only "evolution".
        spread: how far the first candidates are from the start: the standard deviation of their entries, relative to that of
            the model's embeddings. Only "evolution".
        words: a file of words, one a line, that prompts are made of; the server reads it, so it must not be private. Default:
            words of the tokenizer's vocabulary. Only "categories" and "tokens".
        choices: how many words each place of a prompt chooses from. Default: 200. Votes are for up to 4,096 words, those of
            ``start`` among them; default: 1024. Only "categories" and "tokens".
        learning_rate: of the words' logits. Only "categories".
        generations: of a client's own search or edits in a round. Only where clients search alone or vote.
        against_overfitting: compare a record's loss with that of the same record with this share of its tokens replaced at
            random, as FedBPT does: what counts is their ratio. 0: the loss. Only where clients search alone.
    """

    kind: Literal["prompt"]
    method: Annotated[str, method_of(PACKAGE)] = "evolution"
    aggregation: Literal["pooled", "local", "mean", "votes"] = "pooled"
    rounds: Count = 40
    population: Population = 20
    records: Records = 32
    labels: Labels = ()
    score: Score = "loss"
    compute_dtype: ComputeDtype | None = None
    place: Place = "end"
    length: Length = 128
    tokens: PromptLength | None = None
    start: Written | None = None
    dimension: Dimension = 64
    spread: Positive = 1.0
    words: File | None = None
    choices: Count = 200
    learning_rate: Positive = 0.3
    generations: Count = 8
    against_overfitting: Fraction = 0.0

    @property
    def searcher(self) -> Method:
        """The module of the method."""
        return method_of_name(self.method)

    @property
    def searches_alone(self) -> bool:
        """Whether clients search on their own records alone."""
        return self.aggregation in ALONE

    @property
    def local_searcher(self) -> LocalMethod:
        """The module of the method, for clients that search alone."""
        return local_method_of(self.method)

    @property
    def votes(self) -> bool:
        """Whether clients vote for words."""
        return self.aggregation == VOTES

    @property
    def voting_searcher(self) -> VotingMethod:
        """The module of the method, for clients that vote."""
        return voting_method_of(self.method)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        method = data.get("method")
        if "aggregation" not in data and method in plugins.names(PACKAGE):
            data = {**data, "aggregation": method_of_name(method).AGGREGATIONS[0]}
        return {**DEFAULTS.get(str(data.get("aggregation")), {}), **data}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        method = self.searcher
        changed = {key for key, about in type(self).model_fields.items() if getattr(self, key) != about.default}
        of_others = method.NOT_KEYS & changed
        if of_others:
            raise ValueError(f'{min(of_others)}: method = "{self.method}" does not use it; remove it')
        if not self.searches_alone and "against_overfitting" in changed:
            raise ValueError('against_overfitting: it belongs to aggregation = "local"; remove it')
        if not (self.searches_alone or self.votes) and "generations" in changed:
            raise ValueError('generations: they belong to aggregation = "local" or "votes"; remove them')
        if self.aggregation not in method.AGGREGATIONS:
            known = " or ".join(f'"{name}"' for name in method.AGGREGATIONS)
            raise ValueError(f'aggregation: method = "{self.method}" has {known}')
        if self.population < method.LEAST:
            raise ValueError(
                f'population: {self.population} is too small to compare; method = "{self.method}" needs {method.LEAST} or more'
            )
        if len(self.labels) == 1:
            raise ValueError("labels: one label is always right; give two or more, or none for free answers")
        twice = [label for label in self.labels if self.labels.count(label) > 1]
        if twice:
            raise ValueError(f"labels: {twice[0]!r} is there twice; remove one")
        if self.against_overfitting and self.score != "loss":
            raise ValueError('against_overfitting: it is a ratio of losses; take score = "loss", or set it to 0')
        if self.score == "correct" and not self.labels:
            raise ValueError('score: "correct" counts right labels; give labels, or score = "loss"')
        if self.votes and self.choices > MOST_WORDS:
            raise ValueError(f"choices: votes are for {MOST_WORDS:,} words at most; lower it")
        return self

    def records_in(self, round_: int) -> int:
        """Records of each client in a round. The last compares few candidates, so on more records for the same price."""
        more = max(1, self.scores_in_a_round() // FINALISTS)
        return self.records if round_ < self.rounds else min(self.records * more, MOST_RECORDS)

    def scores_in_a_round(self) -> int:
        """How many prompts a client scores on each record of a round."""
        if self.votes:
            return self.population * self.generations + 1 + (self.tokens or TOKENS) + 2
        return self.population * self.generations + 1 if self.searches_alone else self.population

    def candidates_in(self, round_: int) -> int:
        """How many prompts of the server's a client is asked to score in a round, at most."""
        if round_ == self.rounds:
            return FINALISTS
        return self.most_places() + 2 if self.votes else self.population

    def most_places(self) -> int:
        """Words that a prompt has at most, whatever the tokenizer: a start has at most one token more than bytes."""
        return self.tokens or (len(self.start.encode()) + 1 if self.start else TOKENS)

    def number_of_rounds(self) -> int:
        return self.rounds + 1

    def methods(self) -> set[str]:
        return {self.method, self.aggregation}

    def measures(self) -> frozenset[str]:
        return frozenset({self.kind})

    def check(self, job: Job, index: int) -> None:
        self.check_only_stage(job, index)
        self.check_answers(job, "answers", " {label}")
        if job.model.endpoint is not None:
            fault = unfit(job.model.endpoint.logprobs, self.searcher.SOFT, self.score, self.labels)
            if fault:
                raise ValueError(f"stages.{index}: {'; '.join(fault)}")

    def check_secure(self, job: Job, index: int) -> None:
        if self.searches_alone:
            raise ValueError(
                f'privacy.secure_aggregation: stages.{index}.aggregation: what clients find alone is no sum; take "pooled"'
            )
