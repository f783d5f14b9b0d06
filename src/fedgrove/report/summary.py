"""A finished run as plain values; :mod:`fedgrove.report.reader` makes them of a run folder, pages and tables show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedgrove.evaluation.metrics import Parts
from fedgrove.report.paired import Interval, ratio_interval

CENTRALIZED = "centralized"  # the owner of all the text, and the folder of its run
PERPLEXITY = "perplexity/"
CAPABILITIES, ALONE = "rounds/capabilities", "/alone"  # requests around a stage, not for its result, and how their kind ends
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # by the names that safetensors gives to dtypes


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
        """Whether it went around the stages, not into their result."""
        return self.kind.endswith((CAPABILITIES, ALONE))


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        number: its place in the job.
        kind: the name of its folder in ``fedgrove.stages``.
        config: its table in ``job.toml``.
        plan: ``plan-N-KIND.json``; empty where there is none.
    """

    number: int
    kind: str
    config: dict[str, Any]
    plan: dict[str, Any]

    @property
    def clients(self) -> list[str]:
        """Everybody who was planned for, by name."""
        return sorted(self.plan.get("clients", {}))


@dataclass(frozen=True)
class Outcome:
    """What a stage came to, in terms that every page and table can use, whatever the kind of stage.

    Attributes:
        says: what became of the model, such as "50.0% of the weights in 42 matrices are zero"; "": nothing to say.
        zeros: how many weights it pruned to zero.
        weights: how many weights the matrices have that it pruned.
        dense: numbers that one client would send in a round of plain averaging of the same matrices; 0: no such comparison.
        rounds: in how many rounds.
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
        name: of the folder.
        job: the job as it ran.
        stages: of the job, in order.
        outcomes: of each stage.
        files: the JSON files of the run folder that belong to kinds of stage, by name, such as ``pruning.json``.
        clients: everybody who was planned for, sent or received something, by name.
        texts: the held-out texts that were measured before and after, in the job's order.
        dense: perplexity of the model as it came, by text.
        after: by stage, perplexity by text of the model after it.
        alone: by client, perplexity by text of what it would have had without the others; empty if not measured.
        alone_stage: after which stage ``alone`` was measured; compare it with ``together``.
        centralized: perplexity by text of what one owner of all the text would have; empty if that was not run.
        centralized_measured: likewise everything else that was measured, by name.
        examples: (sum, how many) of each window or record that a measurement is the mean of, by (stage, client) and name.
        centralized_examples: likewise, by name.
        exports: what was measured of each form that was exported into the run folder.
        samples: ``samples.json``: each prompt, and what the model wrote before and after.
        rounds_measured: the metrics of single rounds and of clients, but perplexities: by (stage, round, client, name).
        traffic: the ledger, summed by stage, round, client, direction and kind.
        dtype: in which most of the result's numbers are stored, as safetensors names it.
        parameters: of the result.
        model_bytes: all files of ``model/``.
        packed_bytes: all files of ``packed/``; None if the model was not exported so.
        began, ended: Unix times of the first and the last measurement; None without one.
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
        """The last stage."""
        return len(self.stages) - 1

    @property
    def federated(self) -> dict[str, float]:
        """Perplexity of the result, by text."""
        return self.after.get(self.last, {})

    @property
    def together(self) -> dict[str, float]:
        """Perplexity of the model that may be compared with ``alone``: the one after the same stage."""
        return self.federated if self.alone_stage is None else self.after[self.alone_stage]

    @property
    def zeros(self) -> int:
        """Weights that were pruned to zero."""
        return sum(outcome.zeros for outcome in self.outcomes)

    @property
    def pruned_weights(self) -> int:
        """Weights in all pruned matrices; 0: nothing was pruned."""
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
        """The mean over clients of what they have alone, each the geometric mean over the texts."""
        if not self.alone:
            return None
        return sum(self.mean(values) for values in self.alone.values()) / len(self.alone)

    @property
    def owned(self) -> dict[str, str]:
        """The texts that belong to a client that was measured alone: those of its name. By text, the client."""
        return {text: text for text in self.texts if text in self.alone}

    def perplexities(self) -> dict[str, Any]:
        """Perplexity by model and text: dense, alone by client, federated."""
        outcomes: dict[str, Any] = {"dense": self.dense, "alone": self.alone, "federated": self.federated}
        return outcomes | ({"centralized": self.centralized} if self.centralized else {})

    def against_dense(self, texts: Sequence[str]) -> Interval | None:
        """95 % of the result's perplexity divided by the dense model's; see :mod:`fedgrove.report.paired`."""
        return ratio_interval(self.windows(self.last), [self.windows(None)], texts)

    def against_alone(self, clients: Sequence[str], texts: Sequence[str]) -> Interval | None:
        """95 % of ``together`` divided by the mean of what these clients have alone."""
        alone = [self.windows(self.alone_stage, client) for client in clients]
        return ratio_interval(self.windows(self.last if self.alone_stage is None else self.alone_stage), alone, texts)

    def against_centralized(self, texts: Sequence[str]) -> Interval | None:
        """95 % of the result's perplexity divided by that of one owner of all the text."""
        return ratio_interval(self.windows(self.last), [_of_texts(self.centralized_examples)], texts)

    def windows(self, stage: int | None, client: str | None = None) -> dict[str, Parts]:
        """(Loss, tokens) of each window by text, of the model after a stage or of what a client has alone."""
        return _of_texts(self.examples.get((stage, client), {}))

    def sent(self, direction: str, *, overhead: bool = False) -> dict[str, int]:
        """Bytes "up" or "down" by client: of the stages' own work, or of the ``overhead`` (capabilities, measurement)."""
        total = dict.fromkeys(self.clients, 0)
        for row in self.traffic:
            if row.direction == direction and row.overhead == overhead:
                total[row.client] += row.bytes
        return total

    def sent_by_round(self, direction: str) -> dict[tuple[int, int], dict[str, int]]:
        """Bytes "up" or "down" of the stages' own work, by (stage, round), then by client."""
        bytes_by_round: dict[tuple[int, int], dict[str, int]] = {}
        for row in self.traffic:
            if row.direction == direction and not row.overhead:
                by_client = bytes_by_round.setdefault((row.stage, row.round), {})
                by_client[row.client] = by_client.get(row.client, 0) + row.bytes
        return bytes_by_round

    @property
    def uplink(self) -> dict[str, int]:
        """Bytes of the stages' own work that each client sent."""
        return self.sent("up")

    @property
    def downlink(self) -> dict[str, int]:
        """Bytes of the stages' own work that each client was sent."""
        return self.sent("down")

    def dense_round_bytes(self, stage: int) -> int:
        """What one client would send in a round of plain averaging of the same matrices; 0: no such comparison."""
        return self.outcomes[stage].dense * _BYTES.get(self.dtype or "", 2) if stage < len(self.outcomes) else 0

    @property
    def dense_rounds(self) -> int:
        """Rounds of all stages that can be compared with plain averaging."""
        return sum(outcome.rounds for outcome in self.outcomes if outcome.dense)

    @property
    def dense_bytes(self) -> int:
        """What one client would send in all of these rounds."""
        return sum(self.dense_round_bytes(stage) * outcome.rounds for stage, outcome in enumerate(self.outcomes))


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean of the logarithms."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def _of_texts(examples: Mapping[str, Parts]) -> dict[str, Parts]:
    return {name.removeprefix(PERPLEXITY): parts for name, parts in examples.items() if name.startswith(PERPLEXITY)}
