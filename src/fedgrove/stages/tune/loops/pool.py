"""Rounds of a pool: first all train one adapter, then each member of the pool is trained by the clients that have text for it.

A member's round is an ordinary one of :mod:`fedgrove.stages.tune.loops.changes` with fewer clients: the same sum, aggregation
and weights. A client divides its steps among its members as its windows are, so a pool costs it no more steps than one adapter.
With fixed-point numbers all members are trained in one exchange, and which of them a client trains stays with it
(:mod:`fedgrove.stages.tune.exchanges.members`): the server has only sums over all clients.

After each round the state of the stage is the mean of the members, weighted by their windows: the model for whoever has no
weights of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgrove.events import Phase
from fedgrove.files import atomic_folder
from fedgrove.models.digest import digests
from fedgrove.rounds.aggregator.integers import IntegerSums
from fedgrove.rounds.request import Message
from fedgrove.stages.tune.changes import State
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
from fedgrove.stages.tune.exchanges.members import TrainMembers
from fedgrove.stages.tune.exchanges.train import Train
from fedgrove.stages.tune.gates import feature_gate_of, job_gate_of
from fedgrove.stages.tune.gates import random as at_random
from fedgrove.stages.tune.loops import changes
from fedgrove.stages.tune.parametrizations import Mixable, mixable_of
from fedgrove.stages.tune.plan import Plan
from fedgrove.stages.tune.pool.card import GATE, write_card
from fedgrove.stages.tune.pool.config import AUTO
from fedgrove.stages.tune.pool.dealing import steps_of
from fedgrove.stages.tune.pool.fitting import Fit, fields_of, likelihoods_of
from fedgrove.stages.tune.pool.members import Member, mixture, write_members
from fedgrove.stages.tune.pool.newcomers import evaluate_new
from fedgrove.stages.tune.routed import ExpertRules, places_of_members
from fedgrove.stages.tune.state import Measurement, TuningState

TOGETHER = ""  # instead of a client's name, where only the sum over clients is known


class Loop(changes.Loop):
    """See :class:`fedgrove.stages.tune.tuning.Tuning`."""

    method: Mixable

    def __post_init__(self) -> None:
        super().__post_init__()
        self.method = mixable_of(self.config.parametrization)
        assert self.config.pool is not None
        self.pool = self.config.pool
        self.first = self.pool.common_rounds(self.config.rounds)
        self.members: list[TuningState] = []
        self.member: int | None = None  # that is trained
        self.windows: dict[str, tuple[int, ...]] = {}  # by client or ``TOGETHER``, how many each member gets

    def prepare(self, round_: int, again: bool) -> None:
        """Before a round in which members are trained: the members, and each client's windows for them."""
        super().prepare(round_, again)
        if round_ < self.first:
            return
        deals_again = self.pool.method.LOOKS == "members"
        if not self.windows or deals_again:
            if not self.members and round_ > self.first:
                self.members = self._read(round_ - 1)
            self.windows = self._deal(round_)
        if not self.members:
            number = len(next(iter(self.windows.values())))
            self.members = [self._copy() for _ in range(number)]

    def train_round(self, round_: int) -> None:
        """One round of every member; then the mean of all."""
        if round_ < self.first:
            return super().train_round(round_)
        if self.config.deals_in_sums:
            super().train_round(round_)
        else:
            self._train_apart(round_)
        shared = self.state
        mass = [float(sum(windows[number] for windows in self.windows.values())) for number in range(len(self.members))]
        shares = [one / sum(mass) for one in mass]
        for name, change in mixture(self.method, [_changes(member) for member in self.members], shares).items():
            shape = self.decoder.read_shape(name)
            shared.put(name, shape, State(change, self.method.none(shape)))
        for number, member in enumerate(self.members):
            member.write(self._file(round_, number))
        return None

    def _train_apart(self, round_: int) -> None:
        """A round of each member with the clients that have windows for it, one after the other."""
        shared = self.state
        said: list[tuple[int, Measurement]] = []  # with the tokens that count for it
        for number, member in enumerate(self.members):
            member.plan, member.clock, member.metrics = self._plan_of(shared.plan, number), shared.clock, []
            if member.plan.clients:
                phase = Phase("tune", f"member {number + 1} of {len(self.members)}", stage=self.plan.stage, round=round_)
                self.run.phase(phase)
                with self._as_member(number):
                    super().train_round(round_)
                tokens = {client: one.tokens for client, one in member.plan.clients.items()}
                said += [(sum(tokens.values()) if one[0] is None else tokens[one[0]], one) for one in member.metrics]
            shared.clock = member.clock
        shared.metrics += _together(said, shared.clock)

    @contextmanager
    def _as_member(self, number: int) -> Iterator[None]:
        """Within it the state is that of a member."""
        shared = self.state
        self.state, self.member = self.members[number], number
        try:
            yield
        finally:
            self.state, self.member = shared, None

    def finish(self) -> None:
        """Writes the pool to ``RUN/pool``: the members, the gate, a card; and what owners who were not there get of it."""
        super().finish()
        if self.first >= self.config.rounds:
            self.run.message("tune: all rounds are common: there is no pool; lower pool.common")
            return
        members = self.members or self._read(self.config.rounds - 1)
        if self.pool.members == AUTO and len(members) == 1:
            shared = f"that {self.plan.min_group} clients or more have (privacy.min_group)"
            self.run.message(f"tune: the gate tells no kinds of text apart {shared}, so the pool has one member")
        folder, facts = self.run.path / "pool", self._facts(len(members))
        with atomic_folder(folder, replace=True) as partial:
            write_members(self.method, partial, [_changes(member) for member in members])
            if self.pool.method.LOOKS == "features":
                shutil.copyfile(self._work / GATE, partial / GATE)
            write_card(partial, facts, self.federation.job)
        evaluate_new(self.model, self.plan.stage, self.run, self.federation.device)

    def _facts(self, number: int) -> dict[str, Any]:
        windows = self._dealt(self.config.rounds - 1)
        mass = [sum(of[member] for of in windows.values()) for member in range(number)]
        facts = {
            "stage": self.plan.stage,
            "members": number,
            "windows": mass,
            "clients": {client: list(of) for client, of in sorted(windows.items()) if client != TOGETHER},
            "seed": self.seed,
            "length": self.config.length,
            "parametrization": self.config.parametrization,
            "masked": list(self.masked),
            "changed": self.model.is_changed(),
            "digests": digests(self.model),
            "pool": self.pool.model_dump(mode="json"),
        }
        if self.pool.method.LOOKS != "features":
            return facts
        fit = likelihoods_of(self._work)
        return facts | {"likelihoods": fit, "fitted_to": feature_gate_of(self.pool.gate).SAYS.format(fit[-1])}

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
            every = [client.name for client in self.federation.job.of_stage(self.plan.stage).clients]
            gate = job_gate_of(self.pool.gate) if looks == "job" else at_random
            dealt = gate.deal(self.pool, every, str(self.federation.job.seed))
            of = {client: self.plan.clients[client].tokens // self.config.length for client in clients}
            windows = {
                client: tuple(of[client] if member == dealt[client] else 0 for member in range(self.pool.most))
                for client in clients
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

    def _request(self, client: str, round_: int) -> Train:
        request = super()._request(client, round_)
        if self._sums_members:
            return TrainMembers(**dict(request), members=len(self.members))
        if self.member is None:
            return request
        training = request.training.model_copy(update={"steps": self._steps(client, self.member)})
        dealt = not self.pool.method.OF_CLIENTS
        return request.model_copy(update={"training": training, "member": self.member, "dealt": dealt})

    @property
    def _sums_members(self) -> bool:
        """Whether a round is one exchange of all members."""
        return self.config.deals_in_sums and bool(self.members) and self.member is None

    def _start(self, client: str) -> dict[str, Tensor]:
        if not self._sums_members:
            return super()._start(client)
        starts: dict[str, Tensor] = {}
        for number in range(len(self.members)):
            with self._as_member(number):
                starts |= {f"{number}/{name}": value for name, value in super()._start(client).items()}
        return starts

    def _rules(self) -> ExpertRules | None:
        if not self._sums_members:
            return super()._rules()
        return ExpertRules(places_of_members(self.plan.widest(), len(self.members)), 1, self.plan.min_group)

    def _take(self, means: Mapping[str, Tensor]) -> None:
        if not self._sums_members:
            return super()._take(means)
        for number in range(len(self.members)):
            prefix = f"{number}/"
            of_member = {name.removeprefix(prefix): mean for name, mean in means.items() if name.startswith(prefix)}
            with self._as_member(number):
                super()._take(of_member)
        return None

    def _steps(self, client: str, member: int) -> int:
        """A client's steps of a round for a member."""
        windows = self.windows.get(client, ())
        return steps_of(self.config.steps, windows)[member] if any(windows) else 0

    def _plan_of(self, plan: Plan, member: int) -> Plan:
        """The plan of a member's round: the clients that have steps for it, with the tokens that it gets."""
        clients = {}
        for client, one in plan.clients.items():
            steps = self._steps(client, member)
            if steps:
                tokens = self.windows[client][member] * self.config.length
                changed = {"tokens": tokens, "compute": one.compute * steps / self.config.steps}
                clients[client] = one.model_copy(update=changed)
        return plan.model_copy(update={"clients": clients})

    def _copy(self) -> TuningState:
        """A member that begins where the common adapter is."""
        state = self.state
        return TuningState(state.plan, dict(state.states), dict(state.optimizer), dict(state.seen), shapes=dict(state.shapes))

    @property
    def _work(self) -> Path:
        return self.run.path / "work" / f"stage-{self.plan.stage}"

    def _file(self, round_: int, member: int) -> Path:
        return self._work / f"member-{round_:04d}-{member:02d}.safetensors"

    def _read(self, round_: int) -> list[TuningState]:
        """The members after a round."""
        return [TuningState.read(file) for file in sorted(self._work.glob(f"member-{round_:04d}-*.safetensors"))]


def _changes(state: TuningState) -> Member:
    """The change of each linear: all of it is trained, as no client trains a part."""
    return {name: of.live for name, of in state.states.items()}


def _together(said: list[tuple[int, Measurement]], clock: float) -> list[Measurement]:
    """The measurements of a round from those of its members: losses by tokens, seconds added up.

    Args:
        said: each with the tokens that it is of.
        clock: after the last member.
    """
    found: dict[tuple[str | None, str], list[tuple[int, float]]] = {}
    for tokens, (client, name, value) in said:
        found.setdefault((client, name), []).append((tokens, value))
    together: list[Measurement] = []
    for (client, name), values in found.items():
        if name == "clock":
            continue
        total = sum(value for _, value in values)
        mean = sum(tokens * value for tokens, value in values) / sum(tokens for tokens, _ in values)
        together.append((client, name, mean if name == "loss" else total))
    return [*together, (None, "clock", clock)]
