"""FedKSeed (Qin et al., ICML 2024, arXiv 2312.06353): every client draws its own directions from K candidates.

From the paper: K candidates that are fixed at the start; each client sends, for every candidate, the sum of its slopes
along it; the server adds them up, which is FedAvg of the clients' models. With ``sampling = "pro"`` (FedKSeed-Pro), candidates
along which the slopes were large are drawn more often: softmax of the mean |slope|, scaled to [0, 1]. Ours: that mean is
computed from the sums and the public draws, because the server sees sums only, and a candidate that nobody has drawn yet
counts as the mean of the others; in the released code it counts as 0 and is drawn least.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedgrove.stages.tune.aggregation import Drawing, Form

TAKES: frozenset[Form] = frozenset({"coefficients"})
EQUAL_RANKS = False
SHARED_A = False
SERVER_OPTIMIZERS = False
DEFAULTS: Mapping[str, Any] = {"seeds": 4096}
BOUNDED = True
LOCAL_STEPS = True
SAMPLINGS = ("even", "pro")
SCALE = 2**20  # chances are integers, so that every machine draws alike


def draw(drawing: Drawing) -> list[int]:
    """Independent draws, by the stage's seed, the client and the round."""
    rng = random.Random(f"{drawing.seed}/{drawing.round}/directions")
    if drawing.chances is None:
        return [rng.randrange(drawing.seeds) for _ in range(drawing.steps)]
    ends = list(itertools.accumulate(drawing.chances.tolist()))
    return [bisect.bisect_right(ends, rng.randrange(ends[-1])) for _ in range(drawing.steps)]


def summed(drawing: Drawing) -> list[int]:
    """A number for each candidate."""
    return list(range(drawing.seeds))


def chances(coefficients: Tensor, draws: Tensor, sampling: str) -> Tensor | None:
    """None for "even"; else softmax of the mean |step| of each candidate, in [0, 1]: e times as likely at most."""
    seen = draws > 0
    if sampling != "pro" or not seen.any():
        return None
    size = coefficients.double().abs() / draws.clamp(min=1)
    size = torch.where(seen, size, size[seen].mean())
    low, high = size.min(), size.max()
    return (torch.softmax((size - low) / (high - low + 1e-10), 0) / torch.e * len(size) * SCALE).round().long().clamp(min=1)
