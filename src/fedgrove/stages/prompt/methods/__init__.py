"""Methods: how candidate prompts are made of the scores of earlier ones. A new method is a new file here; its file name is its
name in the job.

A method is two functions of plain data: ``propose(state, round) -> candidates`` and ``tell(state, candidates, costs) ->
state``. It never sees a record. A killed stage comes back to the same state by telling the stored costs once more, so both
functions must be deterministic, and draw only from the seed of the task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor

from fedgrove import plugins

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

    def tell(self, state: Any, candidates: Tensor, costs: Sequence[float]) -> Any:
        """The state after a round; it may be the same object, changed.

        Args:
            candidates: as proposed.
            costs: finite, one for each candidate; lower is better.
        """
        ...

    def finalists(self, state: Any) -> Tensor:
        """The candidates of which the best one is the result: first what the search began with, last what it came to."""
        ...


METHOD = Method


def method_of_name(name: str) -> Method:
    """Loads a method by name."""
    return cast(Method, plugins.load(PACKAGE, name))
