"""How a client prunes blocks by itself, as a request says it."""

from __future__ import annotations

import hashlib
from typing import Annotated, Self

from pydantic import Field, model_validator

from fedgrove.job.units import MAX_BLOCKS, Count, Index, Name, Sparsity
from fedgrove.models.masks import Target
from fedgrove.rounds.request import Part
from fedgrove.stages.prune.pruners import Damping


class Recipe(Part):
    """How a client prunes blocks. With the client's text it determines the pruned weights, and so the hidden states after them.

    Attributes:
        pruner, damping: see :mod:`fedgrove.stages.prune.pruners`.
        sparsities: of each block of the model; pattern: (n, m), where n of every m inputs are kept.
        blocks: all blocks that this client is assigned in this round.
    """

    pruner: Name
    damping: Damping
    sparsities: Annotated[tuple[Sparsity, ...], Field(min_length=1, max_length=MAX_BLOCKS)]
    pattern: tuple[Count, Count] | None
    blocks: Annotated[tuple[Index, ...], Field(min_length=1, max_length=MAX_BLOCKS)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.pattern is not None and not self.pattern[0] < self.pattern[1]:
            raise ValueError("pattern: n of every m inputs are kept, so n < m")
        if sorted(set(self.blocks)) != list(self.blocks):
            raise ValueError("blocks: they are not sorted, or one is named twice")
        if max(self.blocks) >= len(self.sparsities):
            raise ValueError(f"blocks: there is no block {max(self.blocks)} of {len(self.sparsities)}")
        return self

    def target(self, block: int) -> Target:
        """How sparse a block becomes."""
        return Target(self.sparsities[block], self.pattern)

    @property
    def through(self) -> str:
        """``through`` of :class:`~fedgrove.client.hidden_states.Calibration` if text passes through blocks pruned this way."""
        return f"own/{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]}"
