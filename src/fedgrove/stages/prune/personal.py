"""A model of one's own: a client prunes with its own sums and a part of everybody else's, and chooses the part.

The sums of all clients hold the client's own, so with both it knows those of the others together, and prunes with

    own + λ · (pooled − own)

λ = 0 is the model of a federation of this client alone, λ = 1 the shared model, bit for bit. A client that knows only its
own text is best on that text and worst on the others'; a small part of the others' sums changes the first little and the
second much. All of this is ours: the sums are those of the aggregation ``pooled``, and λ weighs the others' tokens as
importance weighting does in domain adaptation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedgrove.client.local_client import LocalClient

OTHERS_WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # λ: both ends, and two a decade down to where the others hardly count
TOLERANCE = 0.01  # of perplexity: half of what few windows can tell apart, and the others' text gains many times as much


def with_others(own: Mapping[str, Tensor], pooled: Mapping[str, Tensor], others_weight: float) -> dict[str, Tensor]:
    """own + λ · (pooled − own), tensor by tensor; exactly ``own`` for λ = 0 and exactly ``pooled`` for λ = 1.

    Args:
        own, pooled: int64 sums by name.
        others_weight: λ.

    Returns:
        float64 sums.
    """
    return {name: torch.lerp(own[name].double(), total.double(), others_weight) for name, total in pooled.items()}


def chosen(losses: Sequence[float]) -> int:
    """The index of the largest λ whose perplexity is within :data:`TOLERANCE` of the best one's.

    Args:
        losses: the mean loss per token with each of :data:`OTHERS_WEIGHTS`, in nats, on the windows to choose by.
    """
    most = min(losses) + math.log1p(TOLERANCE)
    return max(index for index, loss in enumerate(losses) if loss <= most)


def candidates_folder(client: LocalClient, stage: int) -> Path:
    """Where a client keeps a candidate for each of :data:`OTHERS_WEIGHTS`, in a folder named after its index."""
    return client.folder / f"candidates-{stage}"


def candidate_file(client: LocalClient, stage: int, index: int, block: int) -> Path:
    """Where a client keeps a block of a candidate."""
    return candidates_folder(client, stage) / str(index) / f"block-{block:04d}.safetensors"


def own_folder(client: LocalClient, stage: int) -> Path:
    """Where a client finds its own model, and what it chose."""
    return client.folder / "personal" / f"stage-{stage}"
