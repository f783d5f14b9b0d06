"""Each client deals its windows to the members of a pool, and says how many each member gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.data.windows import spread, with_labels
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Count, Linears, Name
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.client_model import TrainingRequest
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.frozen import load_again
from fedgrove.stages.tune.gates import loss_gate_of
from fedgrove.stages.tune.parametrizations import Attachment, Mixable, mixable_of
from fedgrove.stages.tune.personal import mean_loss
from fedgrove.stages.tune.pool.config import Members
from fedgrove.stages.tune.pool.dealing import draw_members, keep_deal, steps_of
from fedgrove.stages.tune.pool.features import FittedRequest
from fedgrove.stages.tune.received import by_linear, check_growth, check_linears, check_parts

Windows = Annotated[int, Field(ge=0, le=2**40)]
DEALS = frozenset({Disclosure.MEMBERS})
WINDOWS, TRAINERS = "windows", "clients"  # tensors of a sum of deals


class Dealt(Reply):
    """How many of the client's windows each member gets."""

    windows: Annotated[tuple[Windows, ...], Field(min_length=1, max_length=64)]

    @classmethod
    def of(cls, members: Tensor, number: int) -> Dealt:
        """Counts the member of each window."""
        return cls(windows=tuple(torch.bincount(members, minlength=number).tolist()))

    def check(self, members: int, windows: int) -> None:
        """Refuses numbers that are not those of so many windows.

        Raises:
            WireError: they are others.
        """
        if len(self.windows) != members or sum(self.windows) != windows:
            raise WireError("it deals another number of windows than it reported before")


class Deal(TrainingRequest):
    """What requests to deal windows to the members of a pool have in common."""

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return pooled_rounds(config)

    def beyond(self, job: Agreed) -> str | None:
        return "fixed" if self.fixed is not None else super().beyond(job)


class FeatureDeal(FittedRequest, Deal):
    """What requests to deal windows by their features have in common."""

    IN_SUMS: ClassVar[bool]

    def deal(self, tensors: Tensors, client: LocalClient, device: str) -> Dealt:
        """Deals the client's windows to the members, and keeps which go where on its own disk.

        Raises:
            FedgroveError: the request's tensors do not fit.
        """
        weights = self.method.weights(self.fitted(tensors, client, device), self.state(tensors, client))
        windows = weights.expand(self.tokens // self.length, -1)  # an owner that is one row gives all the same
        members = draw_members(windows, f"{self.seed}/{client.name}")
        keep_deal(client, self.stage, members)
        return Dealt.of(members, self.members)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        return "precision" if config.deals_in_sums != self.IN_SUMS else super().beyond(job)


class DealByFeatures(FeatureDeal):
    """Deal your windows to the members of a pool by their features, keep which go where, and say how many each member gets."""

    KIND: ClassVar[str] = "tune/deal/features"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = DEALS
    REPLY: ClassVar[type[Reply]] = Dealt
    IN_SUMS: ClassVar[bool] = False

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        return Response({}, self.deal(tensors, client, device))

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Dealt)
        reply.check(self.members, self.tokens // self.length)


class SumDeals(FeatureDeal):
    """Deal your windows to the members of a pool by their features, and keep which go where; only sums over clients are used.

    The response contains int64 (members,): ``change/windows``, how many each member gets, and ``change/clients``, 1 for each
    member that the client would train.

    Attributes:
        steps: of a round.
    """

    KIND: ClassVar[str] = "tune/deal/sums"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = DEALS
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "held", "tokens"})
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage", "round", "members")
    IN_SUMS: ClassVar[bool] = True

    steps: Count

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        windows = self.deal(tensors, client, device).windows
        trains = [number > 0 for number in steps_of(self.steps, windows)]
        return Response({CHANGE + WINDOWS: torch.tensor(windows), CHANGE + TRAINERS: torch.tensor(trains).long()}, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        return dict.fromkeys((CHANGE + WINDOWS, CHANGE + TRAINERS), (torch.Size([self.members]), torch.int64))

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        check_deals({name.removeprefix(CHANGE): one for name, one in tensors.items()}, self.tokens // self.length, 1)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        return "steps" if self.steps != config.steps else super().beyond(job)


def check_deals(sums: Mapping[str, Tensor], windows: int, clients: int) -> None:
    """Refuses a sum of deals that so many clients with so many windows together cannot make.

    Args:
        sums: ``windows`` and ``clients``, (members,) each.

    Raises:
        WireError: a number is out of range.
    """
    dealt, trainers = sums[WINDOWS], sums[TRAINERS]
    if bool((dealt < 0).any()) or int(dealt.sum()) != windows:
        raise WireError("it deals another number of windows than it reported before")
    if bool((trainers < 0).any()) or bool((trainers > clients).any()):
        raise WireError("its numbers of clients are out of range")


class DealByLoss(Deal):
    """Measure the members of a pool on some of your windows, train the best one in this round, and say which it is.

    Tensors of the request: ``member-K/<linear>/<part>``, the complete change of each member.

    Attributes:
        gate: its name.
        members: how many.
        windows: how many windows are measured, spread evenly over the text.
        micro: windows computed at once.
        parametrization, masked: as in :class:`~fedgrove.stages.tune.exchanges.train.Train`.
    """

    KIND: ClassVar[str] = "tune/deal/losses"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = DEALS
    REPLY: ClassVar[type[Reply]] = Dealt

    gate: Name
    members: Members
    windows: Count
    micro: Count
    parametrization: Name
    masked: Linears

    @property
    def method(self) -> Mixable:
        """The module of the parametrization."""
        return mixable_of(self.parametrization)

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        decoder, ids, labels = self.model_and_windows(client, device)
        changes = self._changes(tensors, decoder, client)
        learnt = with_labels(labels)
        at = learnt[spread(min(self.windows, len(learnt)), len(learnt))]
        measured, masks = (ids[at], labels[at]), {name: decoder.read_matrix(name) != 0 for name in self.masked}
        losses = [mean_loss(self._with(one, masks, decoder), measured, self.micro) if len(at) else 0.0 for one in changes]
        members = torch.full((len(ids),), loss_gate_of(self.gate).choose(losses))
        return Response({}, Dealt.of(members, self.members))

    def _changes(self, tensors: Tensors, decoder: Decoder, client: LocalClient) -> list[dict[str, Any]]:
        """By member and linear, the change that came.

        Raises:
            FedgroveError: a tensor is no part of a change, or a weight would grow too much.
        """
        shapes, method = decoder.linear_shapes(), self.method
        check_linears(self.masked, shapes, client)
        kinds = [f"member-{member}" for member in range(self.members)]
        largest = {kind: {name: min(shape) for name, shape in shapes.items()} for kind in kinds}
        check_parts(tensors, method, shapes, largest, [torch.float32], False, client)
        found = []
        for kind in kinds:
            changes = {name: method.change_of(parts) for name, parts in by_linear(tensors, kind).items()}
            check_growth(method, changes, decoder, client)
            found.append(changes)
        return found

    def _with(self, changes: Mapping[str, Any], masks: Mapping[str, Tensor], decoder: Decoder) -> Any:
        """The model with a member; members of the same shapes take turns in one model."""
        shapes = {name: [tuple(part.shape) for part in change.parts().values()] for name, change in changes.items()}
        model = load_again(decoder, self.bits, ("members", str(sorted(shapes.items()))))
        starts = {name: self.method.applied(change, decoder.read_shape(name)) for name, change in changes.items()}
        self.method.attach(model, starts, Attachment({}, masks))
        return model

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Dealt)
        reply.check(self.members, self.tokens // self.length)
        if sum(number > 0 for number in reply.windows) != 1:
            raise WireError("it trains more than one member")

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        pool = config.pool
        if pool is None:
            return "pool"
        for key in ("gate", "members", "windows"):
            if getattr(self, key) != getattr(pool, key):
                return f"pool.{key}"
        if self.parametrization != config.parametrization:
            return "parametrization"
        if self.micro > max(config.batches):
            return "micro"
        return super().beyond(job)


def pooled_rounds(config: StageConfig) -> range:
    """The rounds in which members are trained."""
    assert isinstance(config, Config)
    return range(config.rounds if config.pool is None else config.pool.common_rounds(config.rounds), config.rounds)
