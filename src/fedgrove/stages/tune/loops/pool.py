"""Rounds of a pool: first all train one adapter, then each member of the pool is trained by the clients that have text for it.

A member's round is an ordinary one of :mod:`fedgrove.stages.tune.loops.changes` with fewer clients: the same sum, aggregation
and weights. Where each client trains one member, one exchange trains all of them. A client divides its steps among its members
as its windows are, so a pool costs it no more steps than one adapter. With fixed-point numbers and a gate of features one
exchange trains all members, too, and which of them a client trains stays with it
(:mod:`fedgrove.stages.tune.exchanges.members`): the server has only sums over all clients. With gate "user_centric" each client
has a member, which after every round becomes a weighted sum of what all have changed so far.

After each round the state of the stage is the mean of the members, weighted by their windows: the model for whoever has no
weights of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgrove.events import Phase
from fedgrove.files import atomic_folder
from fedgrove.models.digest import digests
from fedgrove.rounds.aggregator.apart import Apart
from fedgrove.rounds.request import Message
from fedgrove.stages.tune.changes import State
from fedgrove.stages.tune.exchanges.members import TrainMembers
from fedgrove.stages.tune.exchanges.train import Train
from fedgrove.stages.tune.fixed_round import FixedRound
from fedgrove.stages.tune.float_round import FloatRound
from fedgrove.stages.tune.gates import feature_gate_of
from fedgrove.stages.tune.parametrizations import Mixable, mixable_of
from fedgrove.stages.tune.plan import Plan
from fedgrove.stages.tune.pool.card import GATE, write_card
from fedgrove.stages.tune.pool.config import AUTO
from fedgrove.stages.tune.pool.dealing import steps_of
from fedgrove.stages.tune.pool.deals import TOGETHER, Dealing
from fedgrove.stages.tune.pool.fitting import likelihoods_of
from fedgrove.stages.tune.pool.members import Member, mixture, write_members
from fedgrove.stages.tune.pool.newcomers import evaluate_new
from fedgrove.stages.tune.pool.weighing import Changes
from fedgrove.stages.tune.routed import ExpertRules, places_of_members
from fedgrove.stages.tune.state import Measurement, TuningState


class Loop(Dealing):
    """See :class:`fedgrove.stages.tune.tuning.Tuning`."""

    method: Mixable

    def __post_init__(self) -> None:
        super().__post_init__()
        self.method = mixable_of(self.config.parametrization)
        self.member: int | None = None  # that is trained
        self.changes: Changes | None = None  # of every client, for gate "user_centric"

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
        if self._weighs and self.changes is None:
            begun, before = round_ > self.first, self._file_of_changes(round_ - 1)
            none = Changes.none(self.method, len(self.members))
            self.changes = Changes.read(self.method, before) if begun else none

    def train_round(self, round_: int) -> None:
        """One round of every member; then the mean of all."""
        if round_ < self.first:
            return super().train_round(round_)
        if self.config.deals_in_sums:
            super().train_round(round_)
        elif self._at_once:
            self._train_at_once(round_)
        else:
            self._train_one_by_one(round_)
        shared = self.state
        mass = [float(sum(windows[number] for windows in self.windows.values())) for number in range(len(self.members))]
        shares = [one / sum(mass) for one in mass]
        for name, change in mixture(self.method, [_changes(member) for member in self.members], shares).items():
            shape = self.decoder.read_shape(name)
            shared.put(name, shape, State(change, self.method.none(shape)))
        for number, member in enumerate(self.members):
            member.write(self._file(round_, number))
        self._forget(round_ - 2)
        return None

    def _forget(self, round_: int) -> None:
        """Removes the members of a round from which no killed run goes on: with a member for each client they are many."""
        for pattern in (f"member-{round_:04d}-*.safetensors", self._file_of_changes(round_).name):
            for file in self._work.glob(pattern):
                file.unlink()

    @property
    def _at_once(self) -> bool:
        """Whether one exchange trains all members: where each client trains one, and its change may be seen."""
        return self.pool.method.OF_CLIENTS and not self.federation.job.privacy.secure_aggregation

    def _train_at_once(self, round_: int) -> None:
        """A round of all members in one exchange; each client trains one of them."""
        shared, before = self.state, [_changes(member) for member in self.members]
        requests, sums = list[dict[str, Train]](), list[FloatRound | FixedRound]()  # by member
        messages, apart = dict[str, Message](), dict[str, FloatRound | FixedRound]()
        for number, member in enumerate(self.members):
            member.plan, member.metrics = self._plan_of(shared.plan, number), []
            with self._as_member(number):
                requests.append({client: self._request(client, round_) for client in sorted(member.plan.clients)})
                messages |= {client: Message(request, self._start(client)) for client, request in requests[-1].items()}
                sums.append(self._sums(requests[-1]))
            apart |= dict.fromkeys(requests[-1], sums[-1])
        clock = self._clock({client: one.compute for client, one in shared.plan.clients.items()})
        heard = sorted(self.federation.aggregator.aggregate(messages, Apart(apart), layout=self.decoder, clock=clock))
        said: list[tuple[int, Measurement]] = []
        for number, member in enumerate(self.members):
            of_member = [client for client in heard if client in requests[number]]
            if of_member:
                with self._as_member(number):
                    self._settle(requests[number], sums[number], of_member, clock)
            said += _with_tokens(member)
        shared.clock += clock.slowest(heard)
        shared.metrics += _together(said, shared.clock)
        if self._weighs:
            self._weigh(round_, before, [number for number, of in enumerate(requests) if of.keys() & set(heard)])

    def _weigh(self, round_: int, before: Sequence[Member], heard: Collection[int]) -> None:
        """Makes each member the weighted sum of what all clients have changed so far.

        Args:
            before: the members as they were sent.
            heard: the members whose client has responded.
        """
        assert self.changes is not None
        round_of = {number: (before[number], _changes(self.members[number])) for number in heard}
        for number in self.changes.add(round_of, self.config.max_change):
            self._say_scaled(self._every[number])
        for member, weights in zip(self.members, self.changes.weights(self.pool.gate, self.windows), strict=True):
            for name, change in self.changes.weighted(weights, round_ - self.first + 1).items():
                shape = self.decoder.read_shape(name)
                member.put(name, shape, State(change, self.method.none(shape)))
        self.changes.write(self._file_of_changes(round_))

    def _train_one_by_one(self, round_: int) -> None:
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
                said += _with_tokens(member)
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
        if self.pool.members == AUTO and len(members) == 1 and not self._weighs:
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
        facts: dict[str, Any] = {
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
        if self._weighs:
            last = self.changes or Changes.read(self.method, self._file_of_changes(self.config.rounds - 1))
            facts["weights"] = dict(zip(self._every, last.weights(self.pool.gate, windows), strict=True))
        if self.pool.method.LOOKS != "features":
            return facts
        fit = likelihoods_of(self._work)
        return facts | {"likelihoods": fit, "fitted_to": feature_gate_of(self.pool.gate).SAYS.format(fit[-1])}

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

    def _file(self, round_: int, member: int) -> Path:
        return self._work / f"member-{round_:04d}-{member:02d}.safetensors"

    def _file_of_changes(self, round_: int) -> Path:
        return self._work / f"owners-{round_:04d}.safetensors"

    def _read(self, round_: int) -> list[TuningState]:
        """The members after a round."""
        return [TuningState.read(file) for file in sorted(self._work.glob(f"member-{round_:04d}-*.safetensors"))]


def _changes(state: TuningState) -> Member:
    """The change of each linear: all of it is trained, as no client trains a part."""
    return {name: of.live for name, of in state.states.items()}


def _with_tokens(member: TuningState) -> list[tuple[int, Measurement]]:
    """A member's measurements of a round, each with the tokens that it is of."""
    tokens = {client: one.tokens for client, one in member.plan.clients.items()}
    return [(sum(tokens.values()) if one[0] is None else tokens[one[0]], one) for one in member.metrics]


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
