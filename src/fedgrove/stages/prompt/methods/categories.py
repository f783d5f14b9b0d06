"""Words by policy gradient: each place of a prompt has a distribution over the same words, and losses say which to prefer.

Of one owner it is BDPL (Diao et al., *Black-box Prompt Learning for Pre-trained Language Models*, TMLR 2023), the text instance
of Fed-BBPT (arXiv 2310.03123). Theirs: probabilities on the simplex by projection; every client learns its own, and the server
averages: aggregation "local". Ours: softmax of logits, which needs no projection, at the server; the gradient is that of the
pooled records' loss, without bias. The released BDPL adds −1/p to the gradient of every word that was not drawn, which is not
the gradient of log p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedgrove.rounds.request import Tensors, TensorSpecs
from fedgrove.stages.prompt.candidates import WORDS, as_ids, as_words
from fedgrove.stages.prompt.methods import Alone, Costs, Found, Task

SOFT = False
AGGREGATIONS = ("pooled", "local")
LEAST = 2
NOT_KEYS = frozenset({"dimension", "spread"})
LOGITS = "logits"  # a tensor that clients begin with, beside the words: (places, words)
LARGEST = 2.0**10  # |logit|
BEST = 2  # prompts of the lowest costs that are remembered
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam (Kingma & Ba 2015)


@dataclass
class State:
    """Where the search is.

    Attributes:
        logits: (places, words) float64.
        moments: Adam's, of the gradient and its square; steps: how many were taken.
        best: the prompts of the lowest costs so far, as (cost, token ids).
    """

    task: Task
    logits: Tensor
    moments: tuple[Tensor, Tensor]
    steps: int = 0
    best: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)


def begin(task: Task) -> State:
    """Every word is as likely as the others."""
    zeros = torch.zeros(task.tokens, len(task.words), dtype=torch.float64)
    return State(task, zeros, (zeros, zeros))


def propose(state: State, round_: int) -> Tensor:
    """Prompts drawn from the distributions."""
    return as_ids([_prompt(state.task, row) for row in draw(state.logits, state.task.population, state.task.seed_of(round_))])


def tell(state: State, round_: int, candidates: Tensor, costs: Sequence[float]) -> State:
    """A step of Adam along the policy gradient."""
    picks = draw(state.logits, state.task.population, state.task.seed_of(round_))
    step, slope = state.steps + 1, gradient(state.logits, picks, torch.tensor(costs, dtype=torch.float64))
    first = BETAS[0] * state.moments[0] + (1 - BETAS[0]) * slope
    second = BETAS[1] * state.moments[1] + (1 - BETAS[1]) * slope.square()
    size = (second / (1 - BETAS[1] ** step)).sqrt() + EPSILON
    logits = state.logits - state.task.learning_rate * first / (1 - BETAS[0] ** step) / size
    prompts = [_prompt(state.task, row) for row in picks]
    best = sorted({*state.best, *zip(costs, prompts, strict=True)})
    distinct = list({prompt: (cost, prompt) for cost, prompt in reversed(best)}.values())
    return State(state.task, logits, (first, second), step, sorted(distinct)[:BEST])


def finalists(state: State) -> Tensor:
    """The start, the best prompts that were drawn, and the likeliest one."""
    likeliest = _prompt(state.task, state.logits.argmax(1))
    start = [state.task.start] if state.task.start else []
    return as_ids([*start, *(prompt for _, prompt in state.best), likeliest])


def gradient(logits: Tensor, picks: Tensor, costs: Tensor) -> Tensor:
    """An estimate, without bias, of the gradient of the expected cost (REINFORCE, Williams 1992, with the mean as baseline).

    Args:
        logits: (places, words).
        picks: (draws, places), the word that was drawn at each place.
        costs: (draws,).

    Returns:
        (places, words): 1/(S − 1) Σ_s (L_s − mean L)·(e_s − p). S − 1, because the mean has each draw's own cost in it.
    """
    drawn = torch.nn.functional.one_hot(picks, logits.shape[1]).double()
    centered = costs - costs.mean()
    return (centered[:, None, None] * (drawn - logits.softmax(1))).sum(0) / (len(costs) - 1)


def draw(logits: Tensor, number: int, seed: int) -> Tensor:
    """Draws words for every place: (number, places) int64, by inversion of uniform numbers."""
    uniform = torch.rand(number, len(logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cumulated = logits.softmax(1).cumsum(1)[:, :-1].contiguous()
    return torch.searchsorted(cumulated, uniform.T.contiguous(), right=True).T


def share(state: State) -> Tensors:
    """The logits, and the words that they are of."""
    return {LOGITS: state.logits, WORDS: as_ids(state.task.words)}


def fits(tensors: Tensors, task: Task) -> bool:
    """Whether they are logits of places and words."""
    if tensors.keys() != {LOGITS, WORDS}:
        return False
    logits, words = tensors[LOGITS], tensors[WORDS]
    return (
        logits.dtype == torch.float64
        and logits.shape == (task.tokens, len(words))
        and bool((logits.abs() <= LARGEST).all())
        and words.dtype == torch.int32
        and words.dim() == 2
        and len(words) >= 2
        and bool((words >= -1).all())
        and bool((words[:, 0] >= 0).all())
    )


def search(tensors: Tensors, alone: Alone, costs: Costs) -> tuple[Tensors, Tensor]:
    """A client's own steps from the server's logits: its logits at the end."""
    words = as_words(tensors[WORDS])
    task = alone.task(len(tensors[LOGITS]), words=words)
    state = begin(task)
    state.logits = tensors[LOGITS]
    for generation in range(alone.generations):
        candidates = propose(state, generation)
        state = tell(state, generation, candidates, costs(candidates))
    return {LOGITS: state.logits}, as_ids([_prompt(task, state.logits.argmax(1))])


def specs(task: Task, generations: int) -> TensorSpecs:
    """Logits."""
    return {LOGITS: (torch.Size([task.tokens, len(task.words)]), torch.float64)}


def merge(state: State, aggregation: str, found: Sequence[Found]) -> State:
    """The mean of the clients' logits, weighted by their records, as Fed-BBPT averages what clients learnt."""
    total = sum(one.weight for one in found)
    state.logits = torch.stack([one.weight / total * one.tensors[LOGITS] for one in found]).sum(0)
    return state


def _prompt(task: Task, picks: Tensor) -> tuple[int, ...]:
    return tuple(token for pick in picks.tolist() for token in task.words[pick])
