"""Soft prompts by CMA-ES (Hansen & Ostermeier 2001) in a random subspace, on losses alone.

Black-box tuning of one owner is Sun et al. (*Black-Box Tuning for Language-Model-as-a-Service*, ICML 2022), that of several
FedBPT (arXiv 2310.01467, ICML 2024). Theirs is the search of every client for itself, aggregation "local". Pooled losses are
ours: with the same candidates at every client, the sum of the losses is the loss on everybody's records, so the search is
exactly that of one owner of all records.

CMA-ES is the library ``cmaes``; above ``FULL`` dimensions its separable form (Ros & Hansen 2008), which keeps a diagonal
instead of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.stages.prompt.methods import Task

SOFT = True
AGGREGATIONS = ("pooled",)
LEAST = 4
NOT_KEYS = frozenset({"words", "choices", "learning_rate"})
FULL = 200  # dimensions up to which CMA-ES has a full matrix: an eigendecomposition in every round


@dataclass
class State:
    """Where the search is.

    Attributes:
        search: a ``cmaes.CMA`` or ``cmaes.SepCMA``. Its own random numbers are seeded anew in every round.
        best: the candidate of the lowest cost so far, (dimension,) float32, and its cost.
    """

    task: Task
    search: Any
    best: tuple[Tensor, float] | None = None


def begin(task: Task) -> State:
    """A standard normal distribution around the start, which is the origin of the subspace."""
    library = _library()
    kind = library.CMA if task.dimension <= FULL else library.SepCMA
    return State(task, kind(mean=np.zeros(task.dimension), sigma=1.0, seed=0, population_size=task.population))


def propose(state: State, round_: int) -> Tensor:
    """Points of the search distribution, rounded to float32: what is told is what was scored."""
    state.search.reseed_rng(state.task.seed_of(round_))
    return torch.from_numpy(np.stack([state.search.ask() for _ in range(state.task.population)]).astype(np.float32))


def tell(state: State, candidates: Tensor, costs: Sequence[float]) -> State:
    """Moves the distribution towards the better half; of equal costs the first candidate counts as better."""
    points = candidates.double().numpy()
    state.search.tell(list(zip(points, costs, strict=True)))
    lowest = min(range(len(costs)), key=costs.__getitem__)
    if state.best is None or costs[lowest] < state.best[1]:
        state.best = candidates[lowest], costs[lowest]
    return state


def finalists(state: State) -> Tensor:
    """The start, the best candidate of any round, and the mean of the distribution."""
    mean = torch.from_numpy(state.search.mean.astype(np.float32))
    best = [state.best[0]] if state.best else []
    return torch.stack([torch.zeros_like(mean), *best, mean])


def _library() -> Any:
    try:
        import cmaes  # an extra
    except ImportError as error:
        raise FedgroveError('method = "evolution" needs cmaes: pip install "fedgrove[prompt]"') from error
    return cmaes
