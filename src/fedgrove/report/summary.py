"""A finished run as plain values: read by :mod:`fedgrove.report.reader`, shown by pages and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedgrove.evaluation.metrics import Parts
from fedgrove.report.paired import Interval, ratio_interval

CENTRALIZED = "centralized"  # the name of the client with all text, and the folder of its run
PERPLEXITY = "perplexity/"
CAPABILITIES, ALONE = "rounds/capabilities", "/alone"  # endings of the kinds of overhead requests
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # by safetensors' names of dtypes


@dataclass(frozen=True)
class Traffic:
    """Messages of one client, of one kind and direction, in one round."""

    stage: int
    round: int
    client: str
    direction: str
    kind: str
    messages: int
    bytes: int

    @property
    def overhead(self) -> bool:
        """Whether these messages were for capabilities or measurement instead of the result."""
        return self.kind.endswith((CAPABILITIES, ALONE))


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        number: its index in the job, from 0.
        kind: the name of its folder in ``fedgrove.stages``.
        config: its table in ``job.toml``.
        plan: the content of ``plan-N-KIND.json``; empty if there is none.
    """

    number: int
    kind: str
    config: dict[str, Any]
    plan: dict[str, Any]

    @property
    def clients(self) -> list[str]:
        """The clients in the plan, sorted by name."""
        return sorted(self.plan.get("clients", {}))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage, in terms that do not depend on the kind of stage.

    Attributes:
        says: the effect on the model, such as "50.0% of the weights in 42 matrices are zero"; "": not stated.
        zeros: the number of weights that it pruned to zero.
        weights: the number of weights in the matrices that it pruned.
        dense: the number of values that one client would send per round for plain averaging of the same matrices; 0: no
            such comparison.
        rounds: the number of rounds.
    """

    says: str = ""
    zeros: int = 0
    weights: int = 0
    dense: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
        name: the name of the run folder.
        job: the content of ``job.toml``.
        stages: the stages of the job, in order.
        outcomes: of each stage.
        files: the content of the stages' JSON files, such as ``pruning.json``, by file name.
        clients: all clients of the job, of the plans and of the ledger, sorted by name.
        texts: the held-out texts that were measured before and after, in the job's order.
        dense: perplexity of the base model, by text.
        after: by stage, perplexity by text of the model after it.
        alone: by client and text, perplexity of the model that it would have without the others; empty if not measured.
        alone_stage: the stage after which ``alone`` was measured; compare ``alone`` with ``together``.
        centralized: perplexity of the centralized run's model, by text; empty if there is no such run.
        centralized_measured: all measurements of that model, by name.
        examples: (sum, count) of each window or record that a measurement is the mean of, by (stage, client) and name.
        centralized_examples: the same for the centralized run, by name.
        exports: the records of the exports in the run folder.
        samples: from ``samples.json``: each prompt, and what the model generated before and after the run.
        rounds_measured: by (stage, round, client, name), all metrics except perplexities after whole stages.
        traffic: the ledger, summed by stage, round, client, direction and kind.
        dtype: the most frequent dtype of the result, in safetensors' name.
        parameters: number of parameters of the result.
        model_bytes: size of all files of ``model/``.
        packed_bytes: size of all files of ``packed/``; None if there is no such export.
        began, ended: Unix times of the first and the last measurement; None if there is none.
    """

    name: str
    job: dict[str, Any]
    stages: list[Stage]
    outcomes: list[Outcome]
    files: dict[str, Any]
    clients: list[str]
    texts: list[str]
    dense: dict[str, float]
    after: dict[int, dict[str, float]]
    alone: dict[str, dict[str, float]]
    alone_stage: int | None
    centralized: dict[str, float]
    centralized_measured: dict[str, float]
    examples: dict[tuple[int | None, str | None], dict[str, Parts]]
    centralized_examples: dict[str, Parts]
    exports: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    rounds_measured: dict[tuple[int | None, int | None, str | None, str], float]
    traffic: list[Traffic]
    dtype: str | None
    parameters: int
    model_bytes: int
    packed_bytes: int | None
    began: float | None
    ended: float | None

    @property
    def last(self) -> int:
        """The index of the last stage."""
        return len(self.stages) - 1

    @property
    def federated(self) -> dict[str, float]:
        """Perplexity of the result, by text."""
        return self.after.get(self.last, {})

    @property
    def together(self) -> dict[str, float]:
        """Perplexity, by text, of the federated model to compare with ``alone``: the one after the same stage."""
        return self.federated if self.alone_stage is None else self.after[self.alone_stage]

    @property
    def zeros(self) -> int:
        """Number of weights that were pruned to zero."""
        return sum(outcome.zeros for outcome in self.outcomes)

    @property
    def pruned_weights(self) -> int:
        """Number of weights in all pruned matrices; 0: nothing was pruned."""
        return sum(outcome.weights for outcome in self.outcomes)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights of all pruned matrices."""
        return self.zeros / max(1, self.pruned_weights)

    def mean(self, values: dict[str, float]) -> float:
        """The geometric mean over the texts."""
        return geometric_mean([values[text] for text in self.texts])

    @property
    def alone_mean(self) -> float | None:
        """The mean of the clients' perplexities alone, each a geometric mean over texts; None if not measured."""
        if not self.alone:
            return None
        return sum(self.mean(values) for values in self.alone.values()) / len(self.alone)

    @property
    def owned(self) -> dict[str, str]:
        """By text, its owner: a client of the same name that was measured alone."""
        return {text: text for text in self.texts if text in self.alone}

    def perplexities(self) -> dict[str, Any]:
        """Perplexity by model and text: dense, alone (by client and text), federated, and centralized if it was run."""
        outcomes: dict[str, Any] = {"dense": self.dense, "alone": self.alone, "federated": self.federated}
        return outcomes | ({"centralized": self.centralized} if self.centralized else {})

    def against_dense(self, texts: Sequence[str]) -> Interval | None:
        """95 % interval of the result's perplexity divided by the dense model's; see :mod:`fedgrove.report.paired`."""
        return ratio_interval([self.windows(self.last)], [self.windows(None)], texts)

    def against_alone(self, clients: Sequence[str], texts: Sequence[str]) -> Interval | None:
        """95 % interval of ``together`` divided by the mean of these clients' perplexities alone."""
        alone = [self.windows(self.alone_stage, client) for client in clients]
        return ratio_interval([self.windows(self.last if self.alone_stage is None else self.alone_stage)], alone, texts)

    def against_centralized(self, texts: Sequence[str]) -> Interval | None:
        """95 % interval of the result's perplexity divided by the centralized model's."""
        return ratio_interval([self.windows(self.last)], [_of_texts(self.centralized_examples)], texts)

    def windows(self, stage: int | None, client: str | None = None) -> dict[str, Parts]:
        """By text, (loss, tokens) of each window, of the model after a stage or of a client's model alone."""
        return self._windows.get((stage, client), {})

    @cached_property  # it is asked for once for every text, and then for every client
    def _windows(self) -> dict[tuple[int | None, str | None], dict[str, Parts]]:
        return {model: _of_texts(examples) for model, examples in self.examples.items()}

    def sent(self, direction: str, *, overhead: bool = False) -> dict[str, int]:
        """Bytes "up" or "down" by client: of the stages, or of the ``overhead`` (capabilities and measurement)."""
        total = dict.fromkeys(self.clients, 0)
        for row in self.traffic:
            if row.direction == direction and row.overhead == overhead:
                total[row.client] += row.bytes
        return total

    def sent_by_round(self, direction: str) -> dict[tuple[int, int], dict[str, int]]:
        """Bytes "up" or "down" without overhead, by (stage, round), then by client."""
        bytes_by_round: dict[tuple[int, int], dict[str, int]] = {}
        for row in self.traffic:
            if row.direction == direction and not row.overhead:
                by_client = bytes_by_round.setdefault((row.stage, row.round), {})
                by_client[row.client] = by_client.get(row.client, 0) + row.bytes
        return bytes_by_round

    @property
    def uplink(self) -> dict[str, int]:
        """Bytes that each client sent, without overhead."""
        return self.sent("up")

    @property
    def downlink(self) -> dict[str, int]:
        """Bytes that each client received, without overhead."""
        return self.sent("down")

    def dense_round_bytes(self, stage: int) -> int:
        """Bytes that one client would send per round for plain averaging of these matrices; 0: no comparison."""
        return self.outcomes[stage].dense * _BYTES.get(self.dtype or "", 2) if stage < len(self.outcomes) else 0

    @property
    def dense_rounds(self) -> int:
        """Number of rounds of all stages that can be compared with plain averaging."""
        return sum(outcome.rounds for outcome in self.outcomes if outcome.dense)

    @property
    def dense_bytes(self) -> int:
        """Bytes that one client would send for plain averaging in all of these rounds."""
        return sum(self.dense_round_bytes(stage) * outcome.rounds for stage, outcome in enumerate(self.outcomes))


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean of the logarithms; NaN without values."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def _of_texts(examples: Mapping[str, Parts]) -> dict[str, Parts]:
    return {name.removeprefix(PERPLEXITY): parts for name, parts in examples.items() if name.startswith(PERPLEXITY)}
