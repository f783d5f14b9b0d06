"""Before a planner chooses, every client scores the linears on its text and measures their gradients; the server averages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Choices, Count, NonNegative
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import CHANGE, Disclosure, Message, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune import fixed_point
from fedgrove.stages.tune import importance as scoring
from fedgrove.stages.tune.client_model import TrainingRequest
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.frozen import load
from fedgrove.stages.tune.objective import Gradients
from fedgrove.stages.tune.personal import hold_out
from fedgrove.stages.tune.planners import planner_of
from fedgrove.stages.tune.training import Settings, draw

IMPORTANCE, KEPT, COHERENCE = f"{CHANGE}importance", f"{CHANGE}kept", f"{CHANGE}coherence"
ROUNDING = 1e-9  # of sums that are 1 at most


class Tokens(Reply):
    """The number of tokens of the client's text, which is the client's weight."""

    tokens: int


class ScoreLinears(TrainingRequest):
    """Score every linear on your text, in a few training steps whose result is discarded.

    The response contains, in the model's order and 0 for experts that the client does not hold: ``change/importance``
    (linears,), the scores; ``change/kept`` (linears, ranks), 0 to 1; and ``change/coherence`` (1,), −1 to 1: see
    :class:`~fedgrove.stages.tune.importance.Measured`. They are float64; with ``fixed`` int32: fixed-point numbers, of the
    scores normalized ones.

    Attributes:
        steps, micro, learning_rate: of the training; batches have ``micro`` windows.
        ranks: those that may be planned.
    """

    KIND: ClassVar[str] = "tune/importance"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.IMPORTANCE, Disclosure.GRADIENTS})
    REPLY: ClassVar[type[Reply]] = Tokens
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "held", "tokens", "micro"})

    steps: Count
    micro: Count
    learning_rate: NonNegative
    ranks: Choices

    @property
    def windows(self) -> int:
        """Those whose gradients are compared; of a single one nothing can be said."""
        return self.steps * self.micro

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        decoder, ids, labels = self.model_and_windows(client, device)
        (ids, labels), _ = hold_out(ids, labels, self.personal)
        if tensors:
            raise client.error("the server sent tensors with a request that has none; refused")
        shapes = decoder.linear_shapes()
        every = list(decoder.shapes_of_all())
        settings = Settings(steps=self.steps, batch=self.micro, micro=1, learning_rate=self.learning_rate)
        batches = draw(ids, labels, settings.batch, 0, f"{self.seed}/{client.name}/importance")
        of_held = scoring.measure(load(decoder, self.bits), shapes, batches, settings, self.seed, self.ranks)
        places = {name: place for place, name in enumerate(every)}
        held = [places[name] for name in shapes]
        scores, kept = torch.zeros(len(every)).double(), torch.zeros(len(every), len(self.ranks)).double()
        scores[held], kept[held] = of_held.scores, of_held.kept
        values = {"importance": scores, "kept": kept, "coherence": of_held.coherence}
        if self.fixed is None:
            return Response({CHANGE + name: value for name, value in values.items()}, Tokens(tokens=self.tokens))
        values["importance"] = torch.tensor(list(scoring.normalized(scores, every).values()), dtype=torch.float64)
        return Response(fixed_point.encode(values, self.weight), Tokens(tokens=self.tokens))

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        number = len(list(layout.linear_names()))
        shapes = {IMPORTANCE: (number,), KEPT: (number, len(self.ranks)), COHERENCE: (1,)}
        dtype = torch.float64 if self.fixed is None else torch.int32
        return {name: (torch.Size(shape), dtype) for name, shape in shapes.items()}

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Tokens)
        self.check_tokens(reply.tokens)

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        _check(tensors, 1.0 if self.fixed is None else self.weight, self.fixed is not None)

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        """Before the first round, and wherever the clients' ranks are planned again."""
        assert isinstance(config, Config)
        return range(config.rounds) if config.replan_off else config.planning_rounds

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if config.epsilon is not None:
            return "epsilon"
        if not planner_of(config.planner).NEEDS_IMPORTANCE:
            return "planner"
        if self.steps != config.importance_steps:
            return "steps"
        if self.learning_rate != config.rate:
            return "learning_rate"
        if self.micro > max(config.batches):
            return "micro"
        if self.ranks != config.ranks:
            return "ranks"
        if (self.fixed is not None) != (config.precision == "fixed"):
            return "fixed"
        if self.fixed is not None and (self.fixed.noise or self.fixed.widest or self.fixed.most != config.most_tokens):
            return "fixed"
        return super().beyond(job)


def _check(tensors: Tensors, weight: float, fixed: bool) -> None:
    """Checks what clients of this total weight sent: a fraction is 0 to 1, and so the sum of fractions 0 to the weight.

    Raises:
        WireError: a number is out of range.
    """
    if fixed:
        fixed_point.check(tensors, weight)
    unit = 2.0**fixed_point.BITS if fixed else 1.0
    for name, least in ((KEPT, 0.0), (COHERENCE, -1.0)):
        values = tensors[name].double() / unit
        if not ((values >= least * weight - ROUNDING) & (values <= weight + ROUNDING)).all():
            raise WireError(f"{name} is not between {least:g} and 1")


class ImportanceSum:
    """The server's half: the importance of each linear and the shape of its gradient, from sums over the clients.

    Args:
        names: of the linears, in the model's order.
        requests: by client.
        most: the largest number of a client's tokens that counts.
        held: by client, the linears that it has, for clients that hold some experts only.
    """

    def __init__(
        self,
        names: list[str],
        requests: Mapping[str, ScoreLinears],
        most: int,
        held: Mapping[str, Collection[str]] = MappingProxyType({}),
    ):
        self._names, self._requests, self._most, self._held = names, requests, most, held
        self._sums = {name: WeightedSum() for name in (IMPORTANCE, KEPT, COHERENCE)}
        self._fixed: dict[str, torch.Tensor] = {}
        self._heard: list[str] = []  # of clients that sent fixed-point numbers

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """The requests unchanged: secure aggregation needs precision "fixed", so they ask for integers already."""
        return dict(messages)

    def ring_bits(self) -> int:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.ring_bits`."""
        return 64

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        """Adds a client's scores."""
        assert isinstance(reply, Tokens)
        if not tensors[IMPORTANCE].is_floating_point():
            for name, value in tensors.items():
                self._fixed[name] = self._fixed.get(name, torch.zeros_like(value, dtype=torch.int64)) + value.long()
            self._heard.append(client)
            return
        weight = float(min(reply.tokens, self._most))
        for name in (IMPORTANCE, KEPT):
            if self._held:  # then every client gets a mask, of all linears or of those that it has
                has = self._held.get(client, self._names)
                mask = torch.tensor([linear in has for linear in self._names])
                self._sums[name].add(
                    tensors[name], mask if name == IMPORTANCE else mask[:, None].expand_as(tensors[name]), weight
                )
            else:
                self._sums[name].add(tensors[name], weight)
        if self._requests[client].windows > 1:
            self._sums[COHERENCE].add(tensors[COHERENCE], weight)

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        """Takes the sum that secure aggregation opened."""
        _check(total, 1.0, fixed=True)
        self._fixed = {name: value.long() for name, value in total.items()}
        self._heard = list(replies)

    def importance(self) -> dict[str, float]:
        """The importance by linear; adds up to 1."""
        if not self._fixed:
            return scoring.normalized(self._sums[IMPORTANCE].mean(), self._names)
        mean = fixed_point.mean(self._fixed[IMPORTANCE], self._weight(IMPORTANCE))
        parts = mean / mean.sum()
        return {name: float(part) for name, part in zip(self._names, parts, strict=True)}

    def gradients(self) -> Gradients:
        """The clients' mean; no coherence if no client compared two windows."""
        kept, agree = self._mean(KEPT), self._mean(COHERENCE)
        by_name = (
            {name: tuple(map(float, row)) for name, row in zip(self._names, kept, strict=True)} if kept is not None else {}
        )
        return Gradients(None if agree is None else float(agree), by_name)

    def _mean(self, name: str) -> torch.Tensor | None:
        if self._fixed:
            weight = self._weight(name)
            return fixed_point.mean(self._fixed[name], weight) if weight else None
        return None if self._sums[name].value is None else self._sums[name].mean()

    def _weight(self, name: str) -> float:
        """The weight of the clients in a sum of fixed-point numbers, in the order of their names."""
        requests = [self._requests[client] for client in sorted(self._heard)]
        return sum((request.weight for request in requests if name != COHERENCE or request.windows > 1), 0.0)
