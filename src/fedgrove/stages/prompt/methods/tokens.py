"""A list of words that clients edit: they vote for the words they came to, and what all of them score best stays.

After FedDTPT (arXiv 2411.00985), for models that say no more than a text. Each client edits the prompt with what it gains on
its own records (:mod:`fedgrove.stages.prompt.editing`). Theirs: it sends its list, and the server makes one prompt of the
lists. Ours: words are of a closed public list, and what is sent is a vote and a place for each of them, which are summed, so
no client's prompt need be seen. The server merges the sums (:mod:`fedgrove.stages.prompt.merging`), and every client scores the
old prompt, the merged one, and that without one of its words each: of these the best one stays, so on the records that were
scored a round never makes the prompt worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.rounds.request import Tensors
from fedgrove.stages.prompt.candidates import WORDS, as_ids, as_words
from fedgrove.stages.prompt.editing import Budget, Lexicon, edit
from fedgrove.stages.prompt.merging import merge_votes
from fedgrove.stages.prompt.methods import Alone, Costs, Task

SOFT = False
AGGREGATIONS = ("votes",)
LEAST = 1
NOT_KEYS = frozenset({"dimension", "spread", "learning_rate"})
PROMPT = "prompt"  # a tensor that clients begin with, beside the words: (m,) indices of words
RUNNERS_UP = 2  # earlier prompts that are compared after the last round


@dataclass(frozen=True)
class State:
    """Where the search is.

    Attributes:
        words: token ids of every word, those of the start first.
        prompt: indices of words.
        offers: the prompts of the round, the old one first.
        earlier: the prompts of earlier rounds, the newest last.
        voters: for each word that clients ever brought in, how many voted for it then, or the last time.
        votes: (words,) of the round.
    """

    task: Task
    words: tuple[tuple[int, ...], ...]
    prompt: tuple[int, ...]
    offers: tuple[tuple[int, ...], ...]
    earlier: tuple[tuple[int, ...], ...] = ()
    voters: dict[int, int] = field(default_factory=dict)
    votes: Tensor | None = None


def begin(task: Task) -> State:
    """The start, each of its tokens a word of the list; without one the first words of the list."""
    start = [(token,) for token in task.start]
    words = tuple(dict.fromkeys([*start, *task.words]))[: len(task.words)]
    fewest = max(2, len(set(start)), task.tokens)
    if len(words) < fewest:
        raise FedgroveError(
            f"choices: {len(words)} words are too few for a prompt of {task.tokens}", f"give {fewest} or more, or lower tokens"
        )
    prompt = tuple(map(words.index, start)) or tuple(range(task.tokens))
    return State(task, words, prompt, (prompt,))


def share(state: State) -> Tensors:
    """The prompt, and the words that there are."""
    return {PROMPT: torch.tensor(state.prompt, dtype=torch.int32), WORDS: as_ids(state.words)}


def fits(tensors: Tensors, task: Task) -> bool:
    """Whether they are a list of words and a prompt of them."""
    if tensors.keys() != {PROMPT, WORDS}:
        return False
    prompt, words = tensors[PROMPT], tensors[WORDS]
    return (
        prompt.dtype == words.dtype == torch.int32
        and words.dim() == 2
        and len(words) == len(task.words)
        and prompt.dim() == 1
        and 1 <= len(prompt) <= task.tokens
        and bool(((prompt >= 0) & (prompt < len(words))).all())
    )


def vote(tensors: Tensors, alone: Alone, places: int, lexicon: Lexicon, costs: Costs) -> tuple[Tensor, Tensor]:
    """A client's edits of the prompt: 1 for each word that it ends with, and the word's place; a second time does not count."""
    words = as_words(tensors[WORDS])

    def of_indices(prompts: Sequence[Sequence[int]]) -> list[float]:
        return costs(_ids(words, prompts))

    budget = Budget(alone.generations, alone.population, places)
    generator = torch.Generator().manual_seed(alone.task(places).seed_of(0))
    found = dict.fromkeys(edit(tensors[PROMPT].tolist(), lexicon, budget, of_indices, generator))
    votes, where = torch.zeros(len(words), dtype=torch.int32), torch.zeros(len(words), dtype=torch.int32)
    votes[list(found)] = 1
    where[list(found)] = torch.arange(len(found), dtype=torch.int32)
    return votes, where


def merge(state: State, votes: Tensor, places: Tensor, embeddings: Tensor) -> State:
    """The prompts to choose from: the old one, the merged one, and that without one of its words each."""
    merged = tuple(merge_votes(votes, places, embeddings, state.task.tokens))
    without = [merged[:i] + merged[i + 1 :] for i in range(len(merged))] if len(merged) > 1 else []
    offers = dict.fromkeys([state.prompt, *([merged] if merged else []), *without])
    return replace(state, offers=tuple(offers), votes=votes)


def propose(state: State, round_: int) -> Tensor:
    """What :func:`merge` came to."""
    return _ids(state.words, state.offers)


def tell(state: State, round_: int, candidates: Tensor, costs: Sequence[float]) -> State:
    """The best one stays; of equal ones the first, so the old one before all others."""
    prompt = state.offers[min(range(len(costs)), key=costs.__getitem__)]
    if prompt == state.prompt:
        return state
    assert state.votes is not None
    votes = state.votes
    new = {word: max(int(votes[word]), state.voters.get(word, 0)) for word in prompt if word not in state.prompt}
    return replace(state, prompt=prompt, earlier=(*state.earlier, state.prompt), voters=state.voters | new)


def finalists(state: State) -> Tensor:
    """What the search began with, the newest earlier prompts, and the last one."""
    return _ids(state.words, _finalists(state))


def words_of_one(state: State, finalist: int) -> list[tuple[int, ...]]:
    """The words of a finalist that clients brought in, and for which never more than one voted."""
    found = _finalists(state)
    return [state.words[word] for word in found[finalist] if word not in found[0] and state.voters[word] == 1]


def _finalists(state: State) -> list[tuple[int, ...]]:
    first, *rest = (*state.earlier, state.prompt)
    return list(dict.fromkeys([first, *rest[:-1][-RUNNERS_UP:], *rest[-1:]]))


def _ids(words: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> Tensor:
    return as_ids([[token for word in prompt for token in words[word]] for prompt in prompts])
