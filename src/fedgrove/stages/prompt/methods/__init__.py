"""Methods: how candidate prompts are made of the scores of earlier ones. A new method is a new file here; its file name is its
name in the job.

A method is two functions of plain data: ``propose(state, round) -> candidates`` and ``tell(state, round, candidates, costs)
-> state``. It never sees a record. A killed stage comes back to the same state by telling the stored costs once more, so both
functions must be deterministic, and draw only from the seed of the task. A method that clients can also use alone, on their own
records, has functions more: see :class:`LocalMethod`; and so has one whose candidates are made of what clients vote for: see
:class:`VotingMethod`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from fedgrove import plugins
from fedgrove.rounds.request import Tensors, TensorSpecs
from fedgrove.stages.prompt.editing import Lexicon

PACKAGE = "stages.prompt.methods"


@dataclass(frozen=True)
class Task:
    """What a method searches in.

    Attributes:
        seed: of the stage.
        population: candidates of a round.
        tokens: of a prompt.
        dimension: of the subspace of soft prompts.
        start: token ids of the written start; empty if there is none.
        words: token ids of each word that a prompt may have.
        learning_rate: of the words' logits.
    """

    seed: str
    population: int
    tokens: int
    dimension: int = 2
    start: tuple[int, ...] = ()
    words: tuple[tuple[int, ...], ...] = ()
    learning_rate: float = 1.0

    def seed_of(self, round_: int) -> int:
        """A seed for the random numbers of a round, below 2³²."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{round_}".encode()).digest()[:4], "little")


class Method(Protocol):
    """The contract of a method's file.

    Candidates are float32 (candidates, dimension), points of the subspace, or int32 (candidates, tokens), token ids with −1
    behind a prompt that is shorter than others.

    Attributes:
        SOFT: whether candidates are points of the subspace of soft prompts.
        AGGREGATIONS: which values of the key ``aggregation`` it has.
        LEAST: the smallest population.
        NOT_KEYS: keys of the stage that it does not use.
    """

    SOFT: bool
    AGGREGATIONS: tuple[str, ...]
    LEAST: int
    NOT_KEYS: frozenset[str]

    def begin(self, task: Task) -> Any:
        """The state before the first round.

        Raises:
            FedgroveError: a library is missing, or there are too few words.
        """
        ...

    def propose(self, state: Any, round_: int) -> Tensor:
        """The candidates of a round."""
        ...

    def tell(self, state: Any, round_: int, candidates: Tensor, costs: Sequence[float]) -> Any:
        """The state after a round; it may be the same object, changed.

        Args:
            candidates: as proposed for the round.
            costs: finite, one for each candidate; lower is better.
        """
        ...

    def finalists(self, state: Any) -> Tensor:
        """The candidates of which the best one is the result: first what the search began with, last what it came to."""
        ...


METHOD = Method
Costs = Callable[[Tensor], list[float]]  # of candidates, on the records of one client


@dataclass(frozen=True)
class Alone:
    """How a client searches alone.

    Attributes:
        seed: of the stage, the round and the client: every client draws its own random numbers, in every round others.
        population: candidates of a generation.
        generations: how many.
        learning_rate: of the words' logits.
    """

    seed: str
    population: int
    generations: int
    learning_rate: float

    def task(self, tokens: int, dimension: int = 2, words: tuple[tuple[int, ...], ...] = ()) -> Task:
        """What the client searches in."""
        return Task(self.seed, self.population, tokens, dimension, (), words, self.learning_rate)


class Found(NamedTuple):
    """What one client came to.

    Attributes:
        tensors: as :meth:`LocalMethod.search` returns them.
        weight: of the records that it searched on, in proportion to how many it has.
        cost: of the result on them.
    """

    tensors: Tensors
    weight: int
    cost: float


class LocalMethod(Method, Protocol):
    """The contract of a method that clients can use alone."""

    def share(self, state: Any) -> Tensors:
        """What clients begin with."""
        ...

    def fits(self, tensors: Tensors, task: Task) -> bool:
        """Whether tensors, which came from the server, can be what clients begin with.

        Args:
            task: as agreed: the number of tokens, dimensions and words.
        """
        ...

    def search(self, tensors: Tensors, alone: Alone, costs: Costs) -> tuple[Tensors, Tensor]:
        """At a client: its own search, from what the server shared.

        Returns:
            What it came to, and (1, …) the candidate that this stands for.
        """
        ...

    def specs(self, task: Task, generations: int) -> TensorSpecs:
        """Shape and dtype of what :meth:`search` came to."""
        ...

    def merge(self, state: Any, aggregation: str, found: Sequence[Found]) -> Any:
        """The state after a round.

        Args:
            aggregation: one of the method's.
            found: of each client, in the order of their names.
        """
        ...


class VotingMethod(Method, Protocol):
    """The contract of a method whose candidates are made of votes for words of a closed list.

    In each round clients vote, ``merge`` takes the sums, and then candidates are proposed and told of as for any method.
    """

    def share(self, state: Any) -> Tensors:
        """What clients begin with; of it ``words`` are the token ids of the list, (words, tokens) int32 with −1 behind."""
        ...

    def fits(self, tensors: Tensors, task: Task) -> bool:
        """Whether tensors, which came from the server, can be what clients begin with. See :meth:`LocalMethod.fits`."""
        ...

    def vote(self, tensors: Tensors, alone: Alone, places: int, lexicon: Lexicon, costs: Costs) -> tuple[Tensor, Tensor]:
        """At a client: its edits, from what the server shared.

        Args:
            places: the most words of a prompt.

        Returns:
            Votes, 1 or 0 for every word, and the places of the words that are voted for: (words,) int32 each.
        """
        ...

    def merge(self, state: Any, votes: Tensor, places: Tensor, embeddings: Tensor) -> Any:
        """The state of which a round's candidates are proposed.

        Args:
            votes, places: the sums over clients, (words,) integers.
            embeddings: of the words, (words, width).
        """
        ...

    def words_of_one(self, state: Any, finalist: int) -> list[tuple[int, ...]]:
        """Token ids of the words of a finalist, given by its number, that are there by the vote of a single client."""
        ...


def method_of_name(name: str) -> Method:
    """Loads a method by name."""
    return cast(Method, plugins.load(PACKAGE, name))


def local_method_of(name: str) -> LocalMethod:
    """Loads a method that clients can use alone."""
    return cast(LocalMethod, plugins.load(PACKAGE, name, LocalMethod))


def voting_method_of(name: str) -> VotingMethod:
    """Loads a method whose candidates are made of votes."""
    return cast(VotingMethod, plugins.load(PACKAGE, name, VotingMethod))
