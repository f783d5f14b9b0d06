"""Soft prompts by CMA-ES (Hansen & Ostermeier 2001) in a random subspace, on losses alone.

Black-box tuning of one owner is Sun et al. (*Black-Box Tuning for Language-Model-as-a-Service*, ICML 2022), that of several
FedBPT (arXiv 2310.01467, ICML 2024): every client runs a CMA-ES of its own from the server's distribution, and the server tells
what they came to another one. That is aggregation "local"; "mean" is FedAvg-BBT, to which the paper compares it. "pooled" is
ours: with the same candidates at every client, the sum of the losses is the loss on everybody's records, so the search is
exactly that of one owner of all records.

CMA-ES is the library ``cmaes``; above ``FULL`` dimensions its separable form (Ros & Hansen 2008), which keeps a diagonal
instead of a matrix. The library does not tell σ and C, which travel under "local", so its own fields are read and set here; a
test sees to it that they are what it searches with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.rounds.request import Tensors, TensorSpecs
from fedgrove.stages.prompt.methods import Alone, Costs, Found, Task

SOFT = True
AGGREGATIONS = ("pooled", "local", "mean")
LEAST = 4
NOT_KEYS = frozenset({"words", "choices", "learning_rate"})
FULL = 200  # dimensions up to which CMA-ES has a full matrix: an eigendecomposition in every round
SMALLEST = 0.5  # σ of what the server hands out under "local" and "mean", in units of the first: the released code's floor
LARGEST = 2.0**20  # |entry| of a mean, a covariance or a σ that a client begins with
MEAN, SPREAD, STEP, STEPS = "mean", "spread", "step", "steps"  # tensors: m, C or its diagonal, σ, the σ of each generation


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
    return State(task, _searching(np.zeros(task.dimension), 1.0, None, task.population))


def propose(state: State, round_: int) -> Tensor:
    """Points of the search distribution, rounded to float32: what is told is what was scored."""
    state.search.reseed_rng(state.task.seed_of(round_))
    return torch.from_numpy(np.stack([state.search.ask() for _ in range(state.task.population)]).astype(np.float32))


def tell(state: State, round_: int, candidates: Tensor, costs: Sequence[float]) -> State:
    """Moves the distribution towards the better half; of equal costs the first candidate counts as better."""
    state.search.tell(list(zip(candidates.double().numpy(), costs, strict=True)))
    return _with_best(state, candidates, costs)


def finalists(state: State) -> Tensor:
    """The start, the best candidate of any round, and the mean of the distribution."""
    mean = torch.from_numpy(state.search.mean.astype(np.float32))
    best = [state.best[0]] if state.best else []
    return torch.stack([torch.zeros_like(mean), *best, mean])


def share(state: State) -> Tensors:
    """Mean, covariance and σ of the server's distribution."""
    spread, step = _spread(state.search)
    return {MEAN: torch.tensor(state.search.mean), SPREAD: torch.tensor(spread), STEP: torch.tensor([step]).double()}


def fits(tensors: Tensors, task: Task) -> bool:
    """Whether they are a distribution of this dimension."""
    size = (task.dimension,)
    shapes = {MEAN: size, SPREAD: size * 2 if task.dimension <= FULL else size, STEP: (1,)}
    return (
        tensors.keys() == shapes.keys()
        and all(one.shape == shapes[name] and one.dtype == torch.float64 for name, one in tensors.items())
        and all(bool((one.abs() <= LARGEST).all()) for one in tensors.values())
        and float(tensors[STEP]) > 0
    )


def search(tensors: Tensors, alone: Alone, costs: Costs) -> tuple[Tensors, Tensor]:
    """A client's own generations of CMA-ES from the server's distribution: its mean at the end, and the σ of each."""
    mean, spread, step = (tensors[name].numpy() for name in (MEAN, SPREAD, STEP))
    task = alone.task(1, len(mean))
    state, steps = State(task, _searching(mean, float(step[0]), spread, task.population)), []
    for generation in range(alone.generations):
        candidates = propose(state, generation)
        state = tell(state, generation, candidates, costs(candidates))
        steps.append(_spread(state.search)[1])
    mean = state.search.mean
    return {MEAN: torch.tensor(mean), STEPS: torch.tensor(steps).double()}, torch.from_numpy(mean.astype(np.float32))[None]


def specs(task: Task, generations: int) -> TensorSpecs:
    """A mean and a σ for each generation."""
    return {
        MEAN: (torch.Size([task.dimension]), torch.float64),
        STEPS: (torch.Size([generations]), torch.float64),
    }


def merge(state: State, aggregation: str, found: Sequence[Found]) -> State:
    """FedBPT: the clients' means are a generation of the server's CMA-ES, whose σ follows from theirs (Eq. 6). Or their mean.

    Eq. 6 has the better half of the clients, and divides by λ, their population; the released code sums over all clients. It is
    the σ of what the clients came to, after generations of steps, so it is larger than the σ of one generation, and no client
    begins with it: as in the released code they begin with the σ of the round before times the factor by which the server's
    grew. The floor of the released code never takes effect; here it does. "mean" weights by records and begins each round with
    C = 1; its σ is the mean of the clients' last ones, with the same floor.
    """
    candidates = torch.stack([one.tensors[MEAN] for one in found])
    costs = [one.cost for one in found]
    if aggregation == "mean":
        weights = np.array([one.weight for one in found]) / sum(one.weight for one in found)
        step = float(weights @ [float(one.tensors[STEPS][-1]) for one in found])
        state.search = _searching(weights @ candidates.numpy(), max(step, SMALLEST), None, state.task.population)
    else:
        spread, before = _spread(state.search)
        better = sorted(range(len(found)), key=costs.__getitem__)[: max(1, len(found) // 2)]
        squares = sum(float(found[i].tensors[STEPS].square().sum()) for i in better)
        step = max(2 * math.sqrt(squares / (len(better) * state.task.population)), SMALLEST)  # a client may send zeros
        if len(found) != state.search.population_size:
            state.search = _searching(state.search.mean, step, spread, len(found))
        state.search._sigma = step
        state.search.tell(list(zip(candidates.numpy(), costs, strict=True)))
        state.search._sigma = max(before * _spread(state.search)[1] / step, SMALLEST)
    return _with_best(state, candidates.float(), costs)


def _with_best(state: State, candidates: Tensor, costs: Sequence[float]) -> State:
    lowest = min(range(len(costs)), key=costs.__getitem__)
    if state.best is None or costs[lowest] < state.best[1]:
        state.best = candidates[lowest], costs[lowest]
    return state


def _searching(mean: Any, step: float, spread: Any, population: int) -> Any:
    """A search of the library from a distribution; ``spread`` None: the identity."""
    library, dimension = _library(), len(mean)
    settings = {"mean": np.array(mean), "sigma": step, "seed": 0, "population_size": population}
    with np.errstate(divide="ignore"):  # of two or three members one is the better half, which C then learns nothing from
        if dimension <= FULL:
            return library.CMA(**settings, cov=None if spread is None else np.array(spread))
        made = library.SepCMA(**settings)
    if spread is not None:
        made._C = np.array(spread)
    return made


def _spread(search: Any) -> tuple[Any, float]:
    """C, or its diagonal, and σ."""
    return search._C, float(search._sigma)


def _library() -> Any:
    try:
        import cmaes  # an extra
    except ImportError as error:
        raise FedgroveError('method = "evolution" needs cmaes: pip install "fedgrove[prompt]"') from error
    return cmaes
