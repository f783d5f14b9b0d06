"""A client's own edits of a prompt: which word to try where, by what earlier tries gained. A bandit over (place, word).

FedDTPT (arXiv 2411.00985) has a masked language model edit a prompt and shows it the accuracies of earlier edits; how it reads
them is not said. Here it is defined. An arm is a word at a place. Its value is the mean gain of the tries that are like it,
those of similar words at that place, and as in UCB1 (Auer et al. 2002) the less is known of an arm, the more is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedgrove.stages.prompt.merging import cosines

LIKELY, NEAR = 8, 4  # words of a place that the model expects there, and that are near the word that is there
PLACE = 0.25  # how alike two words are because they were tried at the same place
EXPLORE = 0.5  # how much is added for what is not known

Costs = Callable[[Sequence[Sequence[int]]], list[float]]  # of prompts, as indices of words


class Arm(NamedTuple):
    """A word, by its index, at a place; a place behind the last word appends it."""

    place: int
    word: int


class Lexicon(NamedTuple):
    """A closed list of words, as a model sees them.

    Attributes:
        embeddings: (words, width).
        expected: gives, for a prompt of m words, (m + 1, words) log p of every word at every place and behind the last.
    """

    embeddings: Tensor
    expected: Callable[[Sequence[int]], Tensor]


class Budget(NamedTuple):
    """How many prompts are tried: ``population`` in each of ``generations``. ``places`` is the most words of a prompt."""

    generations: int
    population: int
    places: int


def edit(prompt: Sequence[int], lexicon: Lexicon, budget: Budget, costs: Costs, generator: torch.Generator) -> list[int]:
    """The prompt after a client's edits: in each generation the best edit is made, if it costs less.

    Args:
        prompt: indices of words.
        costs: on the client's records; lower is better.
        generator: draws proposals. The same at every client, so that clients try the same edits, and votes meet.
    """
    current = list(prompt)
    (cost,) = costs([current])
    tries: list[tuple[Arm, float]] = []
    seen = {tuple(current)}
    embeddings, expected = lexicon.embeddings - lexicon.embeddings.mean(0), lexicon.expected(current)
    for _ in range(budget.generations):
        arms = [
            one for one in propose(current, expected, embeddings, budget.places, generator) if _edited(current, one) not in seen
        ]
        chosen = choose(arms, tries, embeddings, budget.population)
        if not chosen:
            break
        edited = [_edited(current, one) for one in chosen]
        found = costs(edited)
        seen |= set(edited)
        tries += [(one, cost - new) for one, new in zip(chosen, found, strict=True)]
        best = min(range(len(found)), key=found.__getitem__)
        if found[best] < cost:
            tries = _compared_with(tries, chosen[best], current, cost - found[best])
            current, cost = list(edited[best]), found[best]
            expected = lexicon.expected(current)
    return current


def propose(prompt: Sequence[int], expected: Tensor, embeddings: Tensor, places: int, generator: torch.Generator) -> list[Arm]:
    """Arms: for each place words drawn from the model's distribution there, without repetition, and the nearest words.

    Words of the prompt itself are not proposed. Drawn ones come first, the first of every place before the second of any.

    Args:
        expected: (places, words) log p, of the prompt's places and the one behind.
        embeddings: (words, width), without their mean, which all words of a model have in common.
        places: the most words of a prompt.
    """
    uniform = torch.rand(expected.shape, generator=generator, dtype=torch.float64).clamp(min=1e-12)
    drawn = expected.double() - (-uniform.log()).log()  # the largest of log p + Gumbel noise are draws without replacement
    near = cosines(embeddings[list(prompt)], embeddings)
    drawn[:, list(prompt)] = near[:, list(prompt)] = -torch.inf
    rest = drawn.shape[1] - len(set(prompt))
    rows = len(prompt) + (len(prompt) < places)
    ranked = [drawn[:rows].topk(min(LIKELY, rest)).indices, near.topk(min(NEAR, rest)).indices]
    return list(dict.fromkeys(Arm(i % len(of), word) for of in ranked for i, word in enumerate(of.T.flatten().tolist())))


def choose(arms: Sequence[Arm], tries: Sequence[tuple[Arm, float]], embeddings: Tensor, number: int) -> list[Arm]:
    """The arms to try next, by an upper confidence bound: of equal ones the first.

    With K the likeness of arms, n(a) = Σ K(a, tried) and t tries: mean(a) = Σ K(a, tried)·gain / (n(a) + 1), and the bound is
    mean(a) + ½ s·√(ln(t + 1) / (n(a) + 1)), where s is the root mean square of the gains. An arm that was chosen counts for the
    next ones as if it had gained its mean (as in GP-BUCB, Desautels et al. 2014).

    Args:
        tries: earlier arms and what each gained.
        embeddings: (words, width), without their mean.
    """
    gains = torch.tensor([gain for _, gain in tries], dtype=torch.float64)
    scale = float(gains.square().mean().sqrt()) if tries else 0.0
    scale = scale or 1.0  # nothing gained or lost yet
    like = likeness(arms, [arm for arm, _ in tries], embeddings)
    counts, sums = like.sum(1), like @ gains
    chosen: list[int] = []
    for number_tried in range(len(tries), len(tries) + min(number, len(arms))):
        mean = sums / (counts + 1)
        bound = mean + EXPLORE * scale * (math.log(number_tried + 1) / (counts + 1)).sqrt()
        bound[chosen] = -torch.inf
        best = int(bound.argmax())
        chosen.append(best)
        like = likeness(arms, [arms[best]], embeddings)[:, 0]
        sums, counts = sums + like * mean[best], counts + like
    return [arms[i] for i in chosen]


def likeness(arms: Sequence[Arm], others: Sequence[Arm], embeddings: Tensor) -> Tensor:
    """How alike arms are: 0 at different places, else ¼ + ¾·max(0, cosine of the words). (arms, others) float64."""
    if not arms or not others:
        return torch.zeros(len(arms), len(others), dtype=torch.float64)
    ours, theirs = torch.tensor(arms), torch.tensor(others)
    words = cosines(embeddings[ours[:, 1]], embeddings[theirs[:, 1]]).clamp(0.0, 1.0)
    return (ours[:, :1] == theirs[None, :, 0]) * (PLACE + (1 - PLACE) * words)


def _compared_with(
    tries: Sequence[tuple[Arm, float]], made: Arm, prompt: Sequence[int], gain: float
) -> list[tuple[Arm, float]]:
    """Tries after an edit was made: compared with the word that is there now, others at its place gained so much less."""
    later = [(arm, value - gain if arm.place == made.place else value) for arm, value in tries]
    return [*later, *((Arm(made.place, word), -gain) for word in prompt[made.place : made.place + 1])]


def _edited(prompt: Sequence[int], arm: Arm) -> tuple[int, ...]:
    return (*prompt[: arm.place], arm.word, *prompt[arm.place + 1 :])
