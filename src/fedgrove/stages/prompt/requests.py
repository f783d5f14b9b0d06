"""What the requests of a prompt stage have in common: which records are scored how, and what prompts candidates are."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import decoder_of
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import ComputeDtype, Length, Name, Positive, Word
from fedgrove.models.blocks import Decoder
from fedgrove.models.continuations import embed
from fedgrove.rounds.request import Part, Request
from fedgrove.stages.prompt.candidates import are_ids
from fedgrove.stages.prompt.config import (
    MOST_CANDIDATES,
    MOST_TOKENS,
    Config,
    Dimension,
    Labels,
    Place,
    Score,
    unfit,
)
from fedgrove.stages.prompt.config import Records as Number
from fedgrove.stages.prompt.records import Records, records_of
from fedgrove.stages.prompt.scorers import AtEndpoint, OwnModel, Scorer
from fedgrove.stages.prompt.scoring import Prompt
from fedgrove.stages.prompt.subspace import soft_prompts

CANDIDATES = "candidates"  # a tensor of a request
LARGEST = 2.0**20  # |entry| of a point of the subspace
AS_IN_THE_JOB = ("method", "aggregation", "labels", "score", "compute_dtype", "place", "length")
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Subspace(Part):
    """In which soft prompts are; see :mod:`fedgrove.stages.prompt.subspace`.

    Attributes:
        dimension: numbers of a point.
        scale: of A.
        base: token ids whose embeddings are p₀.
    """

    dimension: Dimension
    scale: Positive
    base: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MOST_TOKENS)]

    def reaches(self, points: Tensor) -> bool:
        """Whether all points are of a size that a search comes to, and finite."""
        return bool((points.abs() <= LARGEST).all())


class PromptRequest(Request):
    """A request about prompts and a client's records.

    Attributes:
        method, aggregation, labels, score, compute_dtype, place, length: as in the job.
        records: how many of the client's are drawn.
        seed: of the stage.
        subspace: of soft prompts; None: candidates are token ids.
    """

    method: Name
    aggregation: Name
    labels: Labels
    score: Score
    compute_dtype: ComputeDtype | None = None
    place: Place
    length: Length
    records: Number
    seed: Word
    subspace: Subspace | None = None

    def drawn(self, client: LocalClient, purpose: str = "") -> Records:
        """The records of this round, for each purpose others.

        Raises:
            FedgroveError: see :func:`~fedgrove.stages.prompt.records.records_of`.
        """
        return records_of(client, self.labels, self.length, self.records, f"{self.seed}/{self.round}{purpose}")

    def decoder(self, client: LocalClient, device: str) -> Decoder:
        """The client's model."""
        return decoder_of(client, device, self.compute_dtype)

    def check_candidates(self, candidates: Tensor | None, decoder: Decoder, client: LocalClient) -> Tensor:
        """The candidates as they came.

        Raises:
            FedgroveError: they are missing, of another shape or dtype, not finite, or no tokens of the model.
        """
        dtype, width = (torch.int32, MOST_TOKENS) if self.subspace is None else (torch.float32, self.subspace.dimension)
        if candidates is None or candidates.dtype != dtype or candidates.dim() != 2:
            raise client.error("the candidate prompts that came have another shape or dtype; refused")
        number, entries = candidates.shape
        if not 1 <= number <= MOST_CANDIDATES or entries > width or (self.subspace is not None and entries != width):
            raise client.error("the candidate prompts that came are too many, or of another size; refused")
        vocabulary = decoder.checkpoint.config.get_text_config().vocab_size
        if self.subspace is not None:
            fits = self.subspace.reaches(candidates) and max(self.subspace.base) < vocabulary
        else:
            fits = are_ids(candidates, vocabulary)
        if not fits:
            raise client.error("the candidate prompts that came are none of this model; refused")
        return candidates

    def scorer(self, client: LocalClient, decoder: Decoder) -> Scorer:
        """What scores this request's candidates at the client.

        Raises:
            FedgroveError: the client has an endpoint that cannot.
        """
        if client.endpoint is None:
            return OwnModel(decoder, self.place, lambda candidates: self.prompts(candidates, decoder))
        fault = unfit(client.endpoint.logprobs, self.subspace is not None, self.score, self.labels)
        if fault:
            raise client.error(*fault)
        return AtEndpoint(client, decoder.checkpoint.tokenizer(), self.place, self.labels, self.digest)

    def most_calls(self, records: int, prompts: int) -> int:
        """The most scores of so many prompts on so many records, or requests to an endpoint for them.

        An endpoint may be asked for each token of each label, and a token has a byte at least.
        """
        return records * prompts * (sum(len(label.encode()) + 1 for label in self.labels) or 1)

    def prompts(self, candidates: Tensor, decoder: Decoder) -> list[Prompt]:
        """The candidates as prompts."""
        return prompts_of(candidates, self.subspace, self.seed, decoder)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        for key in AS_IN_THE_JOB:
            if getattr(self, key) != getattr(config, key):
                return key
        if self.records != config.records_in(self.round):
            return "records"
        if (self.subspace is not None) != config.searcher.SOFT:
            return "subspace"
        if self.subspace is not None and self.subspace.dimension != config.dimension:
            return "dimension"
        return "seed" if self.seed != job.seed_of(self.stage) else None


def prompts_of(candidates: Tensor, subspace: Subspace | None, seed: str, decoder: Decoder) -> list[Prompt]:
    """Candidates as prompts.

    Args:
        candidates: (candidates, dimension) float32 points, or (candidates, tokens) int32 ids, −1 behind the last.
        subspace: of points.
        seed: of the stage.
    """
    if subspace is None:
        return [Prompt(embed(decoder, row[row >= 0].long()), written=True) for row in candidates]
    base = embed(decoder, torch.tensor(subspace.base)).float().cpu()
    return [Prompt(one, written=False) for one in soft_prompts(candidates, base, subspace.scale, seed)]
