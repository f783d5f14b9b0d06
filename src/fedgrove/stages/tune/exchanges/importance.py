"""Before a planner chooses ranks, every client scores the linears on its text, and the server averages the scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Count, NonNegative
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import CHANGE, Disclosure, Message, Reply, Response, Tensors, TensorSpecs
from fedgrove.stages.tune import fixed_point
from fedgrove.stages.tune import importance as scoring
from fedgrove.stages.tune.client_model import TrainingRequest
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.frozen import load
from fedgrove.stages.tune.personal import hold_out
from fedgrove.stages.tune.planners import planner_of
from fedgrove.stages.tune.training import Settings, draw

IMPORTANCE = f"{CHANGE}importance"


class Tokens(Reply):
    """The number of tokens of the client's text, which is the client's weight."""

    tokens: int


class ScoreLinears(TrainingRequest):
    """Score every linear on your text, in a few training steps whose result is discarded.

    The response contains ``change/importance``: (linears,) in the model's order, float64; 0 for experts that the client does
    not hold. With ``fixed``, it is int32: the client's normalized scores as fixed-point numbers.

    Attributes:
        steps, micro, learning_rate: of the training; batches have ``micro`` windows.
    """

    KIND: ClassVar[str] = "tune/importance"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.IMPORTANCE})
    REPLY: ClassVar[type[Reply]] = Tokens
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "held", "tokens", "micro"})

    steps: Count
    micro: Count
    learning_rate: NonNegative

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        decoder, ids, labels = self.model_and_windows(client, device)
        (ids, labels), _ = hold_out(ids, labels, self.personal)
        if tensors:
            raise client.error("the server sent tensors with a request that has none; refused")
        shapes = decoder.linear_shapes()
        every = list(decoder.shapes_of_all())
        settings = Settings(steps=self.steps, batch=self.micro, micro=1, learning_rate=self.learning_rate)
        batches = draw(ids, labels, settings.batch, 0, f"{self.seed}/{client.name}/importance")
        of_held = scoring.importance(load(decoder, self.bits), shapes, batches, settings, self.seed)
        places = {name: place for place, name in enumerate(every)}
        scores = torch.zeros(len(every), dtype=of_held.dtype)
        scores[[places[name] for name in shapes]] = of_held
        if self.fixed is None:
            return Response({IMPORTANCE: scores}, Tokens(tokens=self.tokens))
        parts = torch.tensor(list(scoring.normalized(scores, every).values()), dtype=torch.float64)
        return Response(fixed_point.encode({"importance": parts}, self.weight), Tokens(tokens=self.tokens))

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        number = len(list(layout.linear_names()))
        return {IMPORTANCE: (torch.Size([number]), torch.float64 if self.fixed is None else torch.int32)}

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Tokens)
        self.check_tokens(reply.tokens)

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        if self.fixed is not None:
            fixed_point.check(tensors, self.weight)

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        """Before the first round, and wherever the clients' ranks are planned again."""
        assert isinstance(config, Config)
        return config.planning_rounds

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
        if (self.fixed is not None) != (config.precision == "fixed"):
            return "fixed"
        if self.fixed is not None and (self.fixed.noise or self.fixed.widest or self.fixed.most != config.most_tokens):
            return "fixed"
        return super().beyond(job)


class ImportanceSum:
    """The server's half: the importance of each linear, from the sum of the clients' scores.

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
        self._scores = WeightedSum()
        self._fixed: tuple[torch.Tensor, float] | None = None

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """The requests unchanged: secure aggregation needs precision "fixed", so they ask for integers already."""
        return dict(messages)

    def ring_bits(self) -> int:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.ring_bits`."""
        return 64

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        """Adds a client's scores."""
        assert isinstance(reply, Tokens)
        scores = tensors[IMPORTANCE]
        if scores.is_floating_point():
            weight = float(min(reply.tokens, self._most))
            if self._held:  # then every client gets a mask, of all linears or of those that it has
                has = self._held.get(client, self._names)
                self._scores.add(scores, torch.tensor([name in has for name in self._names]), weight)
            else:
                self._scores.add(scores, weight)
            return
        total, weight = self._fixed or (torch.zeros_like(scores, dtype=torch.int64), 0.0)
        self._fixed = total + scores.long(), weight + self._requests[client].weight

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        """Takes the sum that secure aggregation opened."""
        fixed_point.check(total, 1.0)
        self._fixed = total[IMPORTANCE].long(), sum(self._requests[client].weight for client in sorted(replies))

    def importance(self) -> dict[str, float]:
        """The importance by linear; adds up to 1."""
        if self._fixed is None:
            return scoring.normalized(self._scores.mean(), self._names)
        mean = fixed_point.mean(*self._fixed)
        parts = mean / mean.sum()
        return {name: float(part) for name, part in zip(self._names, parts, strict=True)}
