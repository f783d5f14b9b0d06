"""How the loop of a pool asks clients which of their windows each member gets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgrove.events import Phase
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.request import Message
from fedgrove.stages.tune.exchanges.deal import (
    TRAINERS,
    WINDOWS,
    DealByFeatures,
    DealByLoss,
    Dealt,
    FeatureDeal,
    SumDeals,
    check_deals,
)
from fedgrove.stages.tune.exchanges.gate import NOVELTY
from fedgrove.stages.tune.gates import job_gate_of
from fedgrove.stages.tune.gates import random as at_random
from fedgrove.stages.tune.loops import changes
from fedgrove.stages.tune.pool.fitting import Fit, fields_of
from fedgrove.stages.tune.state import TuningState

TOGETHER = ""  # instead of a client's name, where only the sum over clients is known


class Dealing(changes.Loop):
    """Rounds that know which windows each member of a pool gets.

    Attributes:
        windows: by client or ``TOGETHER``, how many each member gets; empty before they are dealt.
        members: the members of the pool; empty before they are trained.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.config.pool is not None
        self.pool = self.config.pool
        self.first = self.pool.common_rounds(self.config.rounds)
        self.windows: dict[str, tuple[int, ...]] = {}
        self.members: list[TuningState] = []

    @property
    def _work(self) -> Path:
        return self.run.path / "work" / f"stage-{self.plan.stage}"

    @property
    def _every(self) -> list[str]:
        """The stage's clients, those that were left out among them."""
        return sorted(client.name for client in self.federation.job.of_stage(self.plan.stage).clients)

    @property
    def _weighs(self) -> bool:
        """Whether each client has a member, a weighted sum of what all clients change."""
        return self.pool.method.LOOKS == "changes"

    def _deal(self, round_: int) -> dict[str, tuple[int, ...]]:
        """How many windows of each client each member gets in this round."""
        looks, clients = self.pool.method.LOOKS, list(self.plan.clients)
        if self.config.deals_in_sums:
            windows = self._deal_in_sums(round_)
        elif looks == "features":
            fitted = Fit(self, self.pool, self._common).run()
            windows = self._ask(self._by_features(DealByFeatures, round_, fitted))
        elif looks == "members" and round_ > self.first:
            windows = self._ask(self._by_loss(round_))
        else:
            every, members = self._every, self.pool.most
            if self._weighs:
                dealt, members = {client: member for member, client in enumerate(every)}, len(every)
            else:
                gate = job_gate_of(self.pool.gate) if looks == "job" else at_random
                dealt = gate.deal(self.pool, every, str(self.federation.job.seed))
            of = {client: self.plan.clients[client].tokens // self.config.length for client in clients}
            windows = {
                client: tuple(of[client] if member == dealt[client] else 0 for member in range(members)) for client in clients
            }
        self.run.write_json(f"work/stage-{self.plan.stage}/deal-{round_:04d}.json", windows)
        return windows

    def _dealt(self, round_: int) -> dict[str, tuple[int, ...]]:
        """What :meth:`_deal` found for the latest round up to this one."""
        files = [file for file in sorted(self._work.glob("deal-*.json")) if file.stem <= f"deal-{round_:04d}"]
        found: dict[str, tuple[int, ...]] = json.loads(files[-1].read_text(encoding="utf-8"))
        return found

    def _deal_in_sums(self, round_: int) -> dict[str, tuple[int, ...]]:
        """How many windows of all clients together each member gets."""
        self.run.phase(Phase("tune", "dealing text to the members of the pool", stage=self.plan.stage))
        fitted = Fit(self, self.pool, self._common).run(partial(self._of_enough_clients, round_))
        if not self.windows:  # the gate was fitted before the run was killed
            self._of_enough_clients(round_, fitted)
        return self.windows

    def _of_enough_clients(self, round_: int, fitted: Mapping[str, Tensor]) -> Tensor:
        """Lets clients deal their windows, and says which members stay, (members,) bool.

        All do if enough clients would train each: else the sum of a member's changes would be that of a few. If not, one of
        those goes, and its windows go to others.
        """
        of = {client: one.tokens // self.config.length for client, one in self.plan.clients.items()}
        found = IntegerSums(lambda sums, heard: check_deals(sums, sum(of[client] for client in heard), len(heard)))
        messages = self._by_features(SumDeals, round_, fitted, steps=self.config.steps)
        self.federation.aggregator.aggregate(messages, found, layout=self.decoder, clock=self._clock({}))
        windows, few = found.sums[WINDOWS], found.sums[TRAINERS] < self.federation.job.together(len(of))
        self.windows = {TOGETHER: tuple(windows.tolist())}
        stays = torch.ones_like(few)
        if len(few) > 1 and bool(few.any()):
            stays[torch.where(few, windows, windows.sum() + 1).argmin()] = False
        return stays

    def _by_features(
        self, kind: type[FeatureDeal], round_: int, fitted: Mapping[str, Tensor], **fields: Any
    ) -> dict[str, Message]:
        """Requests to deal windows by a fitted gate."""
        tensors = {name: value for name, value in fitted.items() if name != NOVELTY}
        gate: dict[str, Any] = {"gate": self.pool.gate, "blocks": self.pool.blocks, "prefix": self.pool.prefix}
        gate |= fields_of(tensors) | fields
        return {
            client: Message(kind(**self._common(client, round_), **gate, tokens=one.tokens), tensors)
            for client, one in self.plan.clients.items()
        }

    def _by_loss(self, round_: int) -> dict[str, Message]:
        """Requests to measure the members."""
        tensors = {
            f"member-{number}/{name}/{part}": value.float().contiguous()
            for number, member in enumerate(self.members)
            for name, state in member.states.items()
            for part, value in state.total().parts().items()
        }
        return {
            client: Message(
                DealByLoss(
                    **self._common(client, round_),
                    gate=self.pool.gate,
                    members=len(self.members),
                    windows=self.pool.windows,
                    micro=one.micro,
                    parametrization=self.config.parametrization,
                    masked=self.masked,
                    tokens=one.tokens,
                ),
                tensors,
            )
            for client, one in self.plan.clients.items()
        }

    def _ask(self, messages: Mapping[str, Message]) -> dict[str, tuple[int, ...]]:
        self.run.phase(Phase("tune", "dealing text to the members of the pool", stage=self.plan.stage))
        windows = {}
        for client, _, reply in self.federation.collect(messages, clock=self._clock({})):
            assert isinstance(reply, Dealt)
            windows[client] = reply.windows
        return windows
