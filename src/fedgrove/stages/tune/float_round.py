"""The server's half of a round of tuning in which clients send floats: their changes are bounded, then aggregated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import CHANGE, Message, Reply, Tensors
from fedgrove.stages.tune.aggregation import ChangeAggregation
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.exchanges.train import Trained
from fedgrove.stages.tune.parametrizations import Trainable
from fedgrove.stages.tune.received import by_linear
from fedgrove.stages.tune.routed import TOKENS, ExpertRules, fractions

FEW = 3  # clients: of fewer, no median says what is usual


@dataclass(frozen=True)
class Bounds:
    """What one client can do to a round.

    Attributes:
        max_change: its change is scaled down to this multiple of the median of all clients' norms.
        most_tokens: its weight counts no more tokens.
    """

    max_change: float
    most_tokens: int


def limit_of(norms: Collection[float], max_change: float) -> float:
    """The largest norm that a client's change of a round may have, a multiple of the median; of few clients, any."""
    return max_change * statistics.median_low(norms) if len(norms) >= FEW else math.inf


class FloatRound:
    """Adds the clients one by one to the aggregation's sum of each linear.

    The median is known when all have responded, so until then their changes wait in files: memory does not grow with the
    number of clients.

    Args:
        states: by linear, for those that are tuned.
        shapes: by linear, (out, in).
        ranks: by linear, the ranks of this round's clients.
        assigned: by client and linear, the rank.
        seed: of the stage, from which a shared A is generated.
        experts: how experts are weighed; None: the model has none, or there is noise.
        folder: for the changes that wait; it is removed.
    """

    def __init__(
        self,
        method: Trainable,
        aggregation: ChangeAggregation,
        states: Mapping[str, State[Any]],
        shapes: Mapping[str, tuple[int, int]],
        ranks: Mapping[str, list[int]],
        assigned: Mapping[str, Mapping[str, int]],
        seed: str,
        bounds: Bounds,
        folder: Path,
        experts: ExpertRules | None = None,
    ):
        self.states, self.shapes, self.ranks = states, shapes, ranks
        self._method, self._aggregation, self._assigned, self._seed = method, aggregation, assigned, seed
        self._bounds, self._folder = bounds, folder
        self.sums = {name: aggregation.sums(states[name], ranks[name]) for name in states}
        self.losses: dict[str, float] = {}
        self._loss = WeightedSum()
        self._experts, self._reached = experts, dict[str, Tensor]()  # by client, the fractions of the round's tokens
        self.unchanged: frozenset[str] = frozenset()
        self._weights: dict[str, float] = {}
        self._norms: dict[str, float] = {}

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """Always raises FedgroveError: floats cannot be summed securely. Such jobs are refused when they are loaded."""
        raise FedgroveError(
            "privacy.secure_aggregation: only fixed-point numbers can be summed securely", 'set precision = "fixed"'
        )

    def ring_bits(self) -> int:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.ring_bits`."""
        return 64

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        """Keeps a client's changes, weighted by its tokens, until the others' are there."""
        assert isinstance(reply, Trained)
        weight = float(min(reply.tokens, self._bounds.most_tokens))
        if reply.loss is not None:
            self._loss.add(torch.tensor(reply.loss, dtype=torch.float64), weight)
            self.losses[client] = reply.loss
        self._weights[client] = weight
        if self._experts is not None:
            self._reached[client] = fractions(tensors.pop(CHANGE + TOKENS), self._experts.per_token)
        self._norms[client] = self._norm(client, tensors, 1.0)
        save_tensors(tensors, self._folder / f"{client}.safetensors")
        tensors.clear()

    def finish(self) -> list[str]:
        """Adds all changes to the sums; returns the clients whose change was scaled down.

        Afterwards ``unchanged`` holds the linears of experts that too few clients trained.

        Raises:
            FedgroveError: a client's change is not finite.
        """
        if self._experts is not None:
            number = torch.stack([reached > 0 for reached in self._reached.values()]).sum(0)
            few = number < self._experts.min_group
            self.unchanged = frozenset(name for name, place in self._experts.places.items() if few[place])
        limit = limit_of(self._norms.values(), self._bounds.max_change)
        scaled = []
        for client, weight in self._weights.items():
            file = self._folder / f"{client}.safetensors"
            tensors = load_file(file)
            file.unlink()
            scale = self._scale(client, tensors, limit)
            if scale < 1:
                scaled.append(client)
            parts = by_linear(tensors, CHANGE.rstrip("/"))
            for name in self._assigned[client]:
                part = self._part(client, name)
                if part:
                    self._aggregation.add(self.sums[name], self._change(client, name, parts[name], scale), weight * part)
        return scaled

    def _part(self, client: str, name: str) -> float:
        """The part of the client's text that trained a linear: 1, or for an expert the tokens that reached it."""
        place = None if self._experts is None else self._experts.places.get(name)
        if place is None:
            return 1.0
        return 0.0 if name in self.unchanged else float(self._reached[client][place])

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        """Not possible: see :meth:`masked`."""
        raise NotImplementedError

    def loss(self) -> float | None:
        """The weighted mean of the clients' losses; None if no client reported one."""
        return float(self._loss.mean()) if self.losses else None

    def _scale(self, client: str, tensors: Tensors, limit: float) -> float:
        """By how much a client's change is scaled so that its norm is within the limit."""
        norm = self._norms[client]
        if norm <= limit:
            return 1.0
        scale = limit / norm
        while self._norm(client, tensors, scale) > limit:  # of two factors that are both scaled, the product is not linear
            scale /= 2
        return scale

    def _norm(self, client: str, tensors: Tensors, scale: float) -> float:
        """The L2 norm, over all linears, of the change that the client made in this round."""
        squares, parts = 0.0, by_linear(tensors, CHANGE.rstrip("/"))
        for name, rank in self._assigned[client].items():
            change = self._change(client, name, parts[name], scale)
            if not self._method.RELATIVE:
                change = change.plus(self._own(name, rank).scaled(-1.0))
            squares += change.norm() ** 2
        norm = math.sqrt(squares)
        if not math.isfinite(norm):
            raise FedgroveError("its change is not finite", "lower learning_rate, or leave it out", client=client)
        return norm

    def _change(self, client: str, name: str, parts: Tensors, scale: float) -> Any:
        """What a client sent of a linear, its difference from the start scaled."""
        rank = self._assigned[client][name]
        own = self._aggregation.begin(self.states[name], rank).own
        change = self._method.received(parts, own, rank, name, self._seed)
        if scale == 1:
            return change
        if self._method.RELATIVE:
            return change.scaled(scale)
        start = self._own(name, rank).parts()
        return self._method.change_of(
            {part: start[part] + scale * (value - start[part]) for part, value in change.parts().items()}
        )

    def _own(self, name: str, rank: int) -> Any:
        """The factors that a client of this rank started from."""
        own = self._aggregation.begin(self.states[name], rank).own
        return self._method.start(own.parts(), {}, self.shapes[name], rank, name, self._seed).own
