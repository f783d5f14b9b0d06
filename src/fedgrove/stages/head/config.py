"""``[[stages]]`` of ``kind = "head"``: the keys of a stage that makes a classification head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from fedgrove.job.stage_config import StageConfig
from fedgrove.job.units import MAX_BLOCKS, Count, HeldOut, Label, Length, Positive, method_of
from fedgrove.stages.head.heads import PACKAGE

if TYPE_CHECKING:
    from fedgrove.job.tables import Job

MAX_LAYERS = 16
MAX_GUESSES = 32
Layer = Annotated[int, Field(ge=-MAX_BLOCKS - 1, le=MAX_BLOCKS)]
Layers = Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MAX_LAYERS)]
Labels = Annotated[tuple[Label, ...], Field(min_length=2, max_length=1000)]


class Config(StageConfig):
    """``[[stages]]`` of ``kind = "head"``: a linear classification head on the frozen model, beside it in ``RUN/head``.

    A record's text is what ``prompt`` of its client makes of it, and its label what ``answer`` does, without the spaces around.

    Attributes:
        kind: what the stage does.
        head: how the head is made: "ridge" (regression on the labels), "discriminant" (linear discriminant analysis) or
            "prototypes" (the nearest class mean).
        labels: all labels. A record with another one is an error.
        layers: the layers whose hidden states are the features, side by side, as transformers counts ``hidden_states``: 0 are
            the embeddings, 1 the output of the first block, −1 what the model's own head reads.
        pool: "mean" over a record's tokens, or the "last" one's hidden state.
        length: tokens of a record that are read, from its beginning.
        size: the number of features; more hidden states than these are projected by a matrix drawn from the seed. Default: no
            projection.
        ridge: added to the variance of every feature, as a fraction of it.
        personal: the fraction of its records that each client holds out, to compare three heads on them: that of all, the same
            with the frequencies of the client's own labels, which it keeps, and one from its own records alone. 0: none.
        guesses: how many times the clients whose records have no labels (no ``answer``) add the records whose labels the head
            guesses most clearly. 0: every client needs labels.
    """

    kind: Literal["head"]
    head: Annotated[str, method_of(PACKAGE)] = "ridge"
    labels: Labels
    layers: Layers = (-1,)
    pool: Literal["mean", "last"] = "mean"
    length: Length = 128
    size: Count | None = None
    ridge: Positive = 0.1
    personal: HeldOut = 0.0
    guesses: Annotated[int, Field(ge=0, le=MAX_GUESSES)] = 0

    @model_validator(mode="after")
    def _differ(self) -> Self:
        for key in ("labels", "layers"):
            values = getattr(self, key)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{key}: {twice[0]!r} is there twice; remove one")
        return self

    def methods(self) -> set[str]:
        return {self.head}

    def measures(self) -> frozenset[str]:
        return frozenset({self.kind})

    def check(self, job: Job, index: int) -> None:
        self.check_only_stage(job, index)
        if not self.guesses:
            self.check_answers(job, "labels", "{label}", ", or have labels guessed (stages.guesses)")

    def centralized(self, job: Job) -> Self:
        return self.model_copy(update={"personal": 0.0})

    def check_secure(self, job: Job, index: int) -> None:
        if self.personal:
            raise ValueError(
                f"privacy.secure_aggregation: stages.{index}.personal: its accuracies cannot be summed securely; set it to 0"
            )
