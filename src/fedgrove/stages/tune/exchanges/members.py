"""Rounds of a pool whose members add up: which of them a client trains, and how much, stays with the client.

In one exchange every client trains all members to which it dealt windows, for as many steps together as one adapter would get.
Of the others it sends zeros. Each member's change is weighted by the windows dealt to it, and so are its zeros: the sum over
clients has the sum of these weights too, from which the server takes each member's mean. So a client sends every member.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import StageConfig
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.aggregator.fixed_point import OutOfRange
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.stages.tune import fixed_point
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.exchanges.deal import pooled_rounds
from fedgrove.stages.tune.exchanges.train import OF_EXPERTS, Train, Trained
from fedgrove.stages.tune.fixed_point import LOSS, fixed_loss
from fedgrove.stages.tune.pool.config import Members
from fedgrove.stages.tune.pool.dealing import members_of, steps_of
from fedgrove.stages.tune.routed import REACHED, WEIGHTS, Counted, check_fixed, counted_in, places_of_members


class TrainMembers(Train):
    """Train the members of a pool for one round, each on the windows that you dealt to it; send all of them.

    Tensors of the request: ``K/own/<linear>/<part>`` and ``K/rest/<linear>/<part>`` for member K, see
    :class:`~fedgrove.stages.tune.exchanges.train.Train`. The response contains int32: ``change/K/<linear>/<part>``,
    ``change/loss``, and ``change/weights`` and ``change/reached`` (1, members), see :mod:`fedgrove.stages.tune.routed`.

    Attributes:
        members: how many.
    """

    KIND: ClassVar[str] = "tune/members"
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage", "round")
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.FACTORS, Disclosure.LOSS, Disclosure.MEMBERS})

    members: Members

    def discloses(self) -> frozenset[Disclosure]:
        return self.DISCLOSES

    def common_tensors(self, tensors: Tensors) -> Tensors:
        return tensors

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        decoder, ids, _ = self.model_and_windows(client, device)
        foreign = [key for key in tensors if key.partition("/")[0] not in map(str, range(self.members))]
        if foreign:
            raise client.error(f"the server sent {foreign[0]}, which is of no member; refused")
        dealt = torch.bincount(members_of(client, self.stage, len(ids)), minlength=self.members)
        steps = steps_of(self.training.steps, dealt.tolist())
        if len(steps) > self.members:
            raise client.error(f"the request is for {self.members} members, but it dealt its text to {len(steps)}; refused")
        trained = torch.tensor([steps], dtype=torch.int64) > 0
        counted = Counted.encode(torch.where(trained, dealt, 0) / len(ids), self.weight)
        numbers: Tensors = {CHANGE + WEIGHTS: counted.weights, CHANGE + REACHED: counted.reached}
        shapes, loss = decoder.shapes_of_all(), 0.0
        try:
            for member, own_steps in enumerate(steps):
                changes: Tensors = {}
                if own_steps:
                    one, prefix = self._of(member, own_steps, int(dealt[member])), f"{member}/"
                    sent = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                    outcome = one.train(sent, client, device)
                    changes = one.changes(outcome)
                    loss += own_steps / self.training.steps * (outcome.loss or 0.0)
                values = {f"{member}/{name}": value for name, value in self.padded(changes, shapes).items()}
                numbers |= fixed_point.encode(values, counted.of((0, member)))
            return Response(numbers | fixed_point.encode({LOSS: fixed_loss(loss)}, self.weight), Trained(tokens=self.tokens))
        except OutOfRange as error:
            raise client.error(str(error)) from error

    def _of(self, member: int, steps: int, windows: int) -> Train:
        """The request that trains one member, as a server that knows the deal would send it."""
        fields = {name: value for name, value in dict(self).items() if name != "members"}
        fields["training"] = self.training.model_copy(update={"steps": steps})
        fields |= {"seen": self.seen * steps // self.training.steps, "tokens": windows * self.length}
        return Train(**{**fields, "member": member, "dealt": True})

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        shapes, of_members = self.fixed_shapes(layout.linear_shapes()), torch.Size([1, self.members])
        specs: TensorSpecs = {
            f"{CHANGE}{member}/{name}": (shape, torch.int32) for member in range(self.members) for name, shape in shapes.items()
        }
        specs |= dict.fromkeys((CHANGE + WEIGHTS, CHANGE + REACHED), (of_members, torch.int32))
        return specs | {CHANGE + LOSS: (torch.Size([1]), torch.int32)}

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        assert self.fixed is not None
        changes: dict[str, Tensor] = {name: tensor for name, tensor in tensors.items() if name not in OF_EXPERTS}
        check_fixed(changes, counted_in(tensors), places_of_members(self.fixed.widest, self.members), self.weight, 1)

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return pooled_rounds(config)

    def members_beyond(self, config: Config) -> str | None:
        if not config.deals_in_sums or config.pool is None or self.members > config.pool.most:
            return "members"
        return "member" if self.member is not None or self.dealt else None
