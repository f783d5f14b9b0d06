"""A round of tuning: clients train on their own text, starting from the server's state; the server aggregates."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedgrove.client.devices import other_devices
from fedgrove.client.local_client import LocalClient
from fedgrove.errors import FedgroveError
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import MOST, Count, Linear, Linears, Name, NonNegative, Positive
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import routing_of
from fedgrove.models.expert_sums import tokens_of_experts
from fedgrove.rounds.aggregator.fixed_point import OutOfRange
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune import fixed_point
from fedgrove.stages.tune.agreed import beyond
from fedgrove.stages.tune.changes import Outcome, Start
from fedgrove.stages.tune.client_model import TrainingRequest, best_folder
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.fixed_point import LOSS, fixed_loss
from fedgrove.stages.tune.frozen import load, load_again
from fedgrove.stages.tune.parametrizations import Attachment, Trainable, trainable_of
from fedgrove.stages.tune.personal import hold_out, keep_best, keep_own, mean_loss, own_before, pull
from fedgrove.stages.tune.pool.config import MOST_MEMBERS
from fedgrove.stages.tune.pool.dealing import members_of
from fedgrove.stages.tune.received import OWN, REST, by_linear, check_growth, check_linears, check_parts
from fedgrove.stages.tune.routed import (
    REACHED,
    TOKENS,
    WEIGHTS,
    Counted,
    check_fixed,
    check_tokens,
    counted_in,
    fractions,
    of_all,
    places_of,
    shape_of,
)
from fedgrove.stages.tune.train_settings import Training, WindowNoise, check_noise
from fedgrove.stages.tune.trainers import trainer_of
from fedgrove.stages.tune.training import Budget, GradientMasks, NotFinite, Settings, Work

OF_EXPERTS = frozenset({CHANGE + TOKENS, CHANGE + WEIGHTS, CHANGE + REACHED})


class Trained(Reply):
    """The reply of a client that trained.

    Attributes:
        tokens: of the client's text: its weight.
        loss: mean training loss per token; None if it is part of the sum, or may not be disclosed.
    """

    tokens: int
    loss: NonNegative | None = None


class Train(TrainingRequest):
    """Train on your text for one round.

    Tensors of the request: ``own/<linear>/<part>`` and ``rest/<linear>/<part>``, the client's start; missing parts are
    initialized. The response contains ``change/<linear>/<part>``: the trained values or the difference that the round
    made (see :attr:`~fedgrove.stages.tune.parametrizations.Parametrization.RELATIVE`). With ``fixed``, it contains
    int32: the difference, and ``change/loss`` unless there is noise. Of a mixture of experts, without noise, it also contains
    what weighs the experts (see :mod:`fedgrove.stages.tune.routed`), (blocks with experts, experts) each: ``change/tokens``
    int64, or with ``fixed`` ``change/weights`` and ``change/reached`` int32.

    Attributes:
        parametrization, trainer: names.
        shared_a: all clients share one A, which is not trained.
        ranks: by linear, for those that this client trains.
        scales: by linear, LoRA's α/r.
        masked: the linears whose zeros stay zero.
        seen: how many windows this client trained on in earlier rounds.
        dtype: of the response.
        training: the settings.
        pull: how strongly the client's own change, which it trains besides, is pulled towards the shared one; 0: it trains
            none, and its own change is the one that it sends.
        windows: the privacy budget, for trainers that add noise.
        member: of a pool, the member that is trained; None: there is one adapter for all.
        dealt: train only on the windows that the client dealt to this member.
    """

    KIND: ClassVar[str] = "tune/train"
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage", "round", "member")
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset(
        {Disclosure.FACTORS, Disclosure.CHANGES, Disclosure.SCALES, Disclosure.LOSS, Disclosure.EXPERT_TOKENS}
    )
    REPLY: ClassVar[type[Reply]] = Trained
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset(
        {
            "bits",
            "held",
            "ranks",
            "scales",
            "tokens",
            "seen",
            "training.batch",
            "training.micro",
            "training.steps",
            "windows.noise",
        }
    )

    parametrization: Name
    trainer: Name
    shared_a: bool
    ranks: Annotated[dict[Linear, Count], Field(max_length=2**18)]
    scales: Annotated[dict[Linear, Positive], Field(max_length=2**18)]
    masked: Linears
    seen: Annotated[int, Field(ge=0, le=MOST)]
    dtype: Literal["float32", "bfloat16"]
    training: Training
    pull: NonNegative = 0.0
    windows: WindowNoise | None = None
    member: Annotated[int, Field(ge=0, lt=MOST_MEMBERS)] | None = None
    dealt: bool = False

    @property
    def noisy(self) -> bool:
        """Whether noise protects the response; then the loss is not sent."""
        return self.windows is not None or (self.fixed is not None and self.fixed.noise is not None)

    @property
    def method(self) -> Trainable:
        """The module of the parametrization."""
        return trainable_of(self.parametrization)

    def discloses(self) -> frozenset[Disclosure]:
        return frozenset({self.method.DISCLOSES} | (set() if self.noisy else {Disclosure.LOSS, Disclosure.EXPERT_TOKENS}))

    def adders(self) -> int:
        return self.fixed.noise.adders if self.fixed and self.fixed.noise else 1

    def release(self) -> str | None:
        return f"{self.stage}/{self.round}" if self.noisy else None

    def chosen_windows(self, client: LocalClient, windows: int) -> Tensor | None:
        return members_of(client, self.stage, windows).eq(self.member or 0) if self.dealt else None

    def common_tensors(self, tensors: Tensors) -> Tensors:
        """For each part of a linear's change, what this client trains and the rest, side by side: ranks may differ."""
        if not self.method.RANKED:
            return tensors
        joined: dict[str, list[Tensor]] = {}
        for kind in (OWN, REST):
            for name, tensor in sorted(tensors.items()):
                if name.startswith(f"{kind}/"):
                    joined.setdefault(name.removeprefix(f"{kind}/"), []).append(tensor)
        return {name: torch.cat(parts, dim=1) for name, parts in joined.items()}

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        outcome = self.train(tensors, client, device)
        try:
            return Response(*self._packed(outcome))
        except OutOfRange as error:
            raise client.error(str(error)) from error

    def train(self, tensors: Tensors, client: LocalClient, device: str) -> Outcome:
        """Trains for the round.

        Raises:
            FedgroveError: what came does not fit, or the loss is not finite.
        """
        method = self.method
        check_noise(self.windows, self.fixed.noise if self.fixed else None, self.round, client)
        decoder, ids, labels = self.model_and_windows(client, device)
        (ids, labels), held_out = hold_out(ids, labels, self.personal)
        every = decoder.shapes_of_all()
        check_linears({*self.ranks, *self.masked, *(self.fixed.widest if self.fixed else ())}, every, client)
        shapes = {name: every[name] for name in decoder.linear_names()}  # without experts that the client does not hold
        names = [name for name in self.ranks if name in shapes]
        masks = {name: decoder.read_matrix(name) != 0 for name in self.masked if name in shapes}
        check_parts(tensors, method, every, self._largest(every), [getattr(torch, self.dtype)], self.shared_a, client)
        own_parts, rest = by_linear(tensors, OWN), by_linear(tensors, REST)
        starts = {
            name: method.start(own_parts.get(name, {}), rest.get(name, {}), shape, self.ranks.get(name, 0), name, self.seed)
            for name, shape in shapes.items()
        }
        if not self.noisy:  # noise protects the text whatever the weights are, and makes them grow
            check_growth(method, {name: begun.own.plus(begun.rest) for name, begun in starts.items()}, decoder, client)
        how = Attachment(self.scales, masks, self.shared_a)
        settings = Settings(**self.training.model_dump())
        folder = best_folder(client, self.stage)
        own_starts = self._own_starts(folder, starts, shapes) if self.pull else starts  # before training, which changes it
        shared = {name: begun.own.plus(begun.rest) for name, begun in starts.items()} if self.pull else {}
        try:
            model = self._loaded(decoder, starts)
            work = self.work((ids, labels), method.attach(model, starts, how), model, client)
            try:
                with tokens_of_experts(model) as counts:
                    loss = trainer_of(self.trainer).train(model, work, settings)
                trained = method.detach(model, names, starts)
            except NotFinite:
                if not self.noisy:
                    raise
                loss, trained = None, {}  # a change of zeros: an error would tell something of the text without noise
            if held_out:
                own = trained
                if self.pull:
                    del model, work  # there is memory for one model
                    model = self._loaded(decoder, own_starts)
                    work = self.work((ids, labels), method.attach(model, own_starts, how), model, client)
                    penalty = pull(model, method, own_starts, names, shared, self.pull)
                    trainer_of(self.trainer).train(model, replace(work, penalty=penalty), replace(settings, proximal=0.0))
                    own = method.detach(model, names, own_starts)
                    keep_own(folder, self.round, own, own_starts)
                total = {n: method.total(own[n], begun) if n in own else begun.rest for n, begun in own_starts.items()}
                own_loss = mean_loss(model, held_out.choose, self.training.micro)
                keep_best(folder, method, own_loss, total, begin=self.round == 0)
            tokens = of_all(decoder, counts) if counts and not self.noisy else None
            return Outcome(trained, starts, every, loss, tokens, decoder)
        except FedgroveError as error:
            raise client.error(str(error)) from error

    def _loaded(self, decoder: Decoder, starts: Mapping[str, Start[Any]]) -> nn.Module:
        """The model; if its weights are frozen, the one of the round before, with the same attached."""
        return load_again(decoder, self.bits, self._attached(starts)) if self.method.FROZEN else load(decoder, self.bits)

    def _attached(self, starts: Mapping[str, Start[Any]]) -> Hashable:
        """What a parametrization attaches to the model, apart from its values."""
        rest = [name for name, begun in starts.items() if any(part.numel() for part in begun.rest.parts().values())]
        trained = [name for name, rank in self.ranks.items() if rank and name in starts]
        return self.parametrization, tuple(sorted(trained)), tuple(sorted(rest)), tuple(sorted(self.masked))

    def work(self, windows: tuple[Tensor, Tensor], masks: GradientMasks, model: nn.Module, client: LocalClient) -> Work:
        """What a trainer gets besides the model and the settings."""
        return Work(
            *windows,
            self.seen,
            f"{self.seed}/{client.name}",
            masks,
            other_devices(client, next(model.parameters()).device),
            Budget(**self.windows.model_dump()) if self.windows else None,
        )

    def _own_starts(
        self, folder: Path, starts: dict[str, Start[Any]], shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, Start[Any]]:
        """Where the client's own change was after the round before; in its first round, where the shared one is."""
        stored = own_before(folder, self.round)
        if stored is None:
            return copy.deepcopy(starts)  # the other's values change in training
        return {
            name: self.method.start(
                stored.get(f"{OWN}/{name}", {}),
                stored.get(f"{REST}/{name}", {}),
                shape,
                self.ranks.get(name, 0),
                name,
                self.seed,
            )
            for name, shape in shapes.items()
        }

    def _largest(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
        """The largest rank of what is sent: of a client's own part its rank, of the rest what a matrix can have."""
        full = {name: min(shape) + max(self.ranks.values(), default=0) for name, shape in shapes.items()}
        return {OWN: {name: self.ranks.get(name, 0) for name in shapes}, REST: full}

    def _packed(self, outcome: Outcome) -> tuple[Tensors, Trained]:
        """The response."""
        loss, tokens = outcome.loss, outcome.tokens
        if self.fixed is None:
            dtype = getattr(torch, self.dtype)
            sent = {
                f"{CHANGE}{name}/{part}": value.to(dtype)
                for name, change in outcome.trained.items()
                for part, value in change.parts().items()
                if not (self.shared_a and part == "a")
            }
            of_experts = {} if tokens is None else {CHANGE + TOKENS: tokens}
            return {**sent, **of_experts}, Trained(tokens=self.tokens, loss=None if self.noisy else loss)
        mechanism = self.fixed.noise.mechanism(self.weight) if self.fixed.noise else None
        changes = self.changes(outcome)
        values = self.padded(mechanism.clip(changes) if mechanism else changes, outcome.shapes)
        if loss is not None and not mechanism:
            values[LOSS] = fixed_loss(loss)
        numbers = {}
        if tokens is not None:
            per_token = routing_of(outcome.decoder.checkpoint.config).per_token
            counted = Counted.encode(fractions(tokens, per_token), self.weight)
            numbers = {CHANGE + WEIGHTS: counted.weights, CHANGE + REACHED: counted.reached}
            places = places_of(outcome.decoder, outcome.shapes)
            for name in [name for name in values if name.rpartition("/")[0] in places]:
                numbers |= fixed_point.encode({name: values.pop(name)}, counted.of(places[name.rpartition("/")[0]]))
        numbers |= fixed_point.encode(values, self.weight)
        return (mechanism.add_share(numbers) if mechanism else numbers), Trained(tokens=self.tokens)

    def changes(self, outcome: Outcome) -> Tensors:
        """What the round changed of each linear that was trained: ``<linear>/<part>``, floats."""
        return {
            f"{name}/{part}": value
            for name, change in outcome.trained.items()
            for part, value in self.method.round_change(change, outcome.starts[name], self.shared_a).items()
        }

    def padded(self, changes: Tensors, shapes: Mapping[str, tuple[int, int]]) -> Tensors:
        """The same of all linears of a sum: some have more columns at other clients, or are not trained here."""
        values = {}
        for name, shape in self.fixed_shapes(shapes).items():
            change = changes.get(name)
            values[name] = (
                torch.zeros(shape) if change is None else nn.functional.pad(change, (0, shape[-1] - change.shape[-1]))
            )
        return values

    def fixed_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Size]:
        assert self.fixed is not None
        return {
            f"{name}/{part}": shape
            for name, widest in self.fixed.widest.items()
            for part, (shape, _) in self.method.expected(shapes[name], widest, torch.float32, self.shared_a).items()
        }

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        shapes = layout.linear_shapes()
        of_experts = None if self.noisy else shape_of(layout)
        if self.fixed is not None:
            specs: TensorSpecs = {CHANGE + name: (shape, torch.int32) for name, shape in self.fixed_shapes(shapes).items()}
            if of_experts is not None:
                specs |= dict.fromkeys((CHANGE + WEIGHTS, CHANGE + REACHED), (of_experts, torch.int32))
            return specs if self.noisy else {**specs, CHANGE + LOSS: (torch.Size([1]), torch.int32)}
        dtype = getattr(torch, self.dtype)
        specs = {
            f"{CHANGE}{name}/{part}": spec
            for name, rank in self.ranks.items()
            for part, spec in self.method.expected(shapes[name], rank, dtype, self.shared_a).items()
        }
        return specs if of_experts is None else {**specs, CHANGE + TOKENS: (of_experts, torch.int64)}

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Trained)
        self.check_tokens(reply.tokens)
        reports_loss = self.fixed is None and not self.noisy  # else it is part of the sum, or may not be disclosed
        if (reply.loss is not None) != reports_loss:
            raise WireError("its loss is not a finite number" if reports_loss else "it reports a loss that was not requested")

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        assert layout is not None
        changes = {name: tensor for name, tensor in tensors.items() if name not in OF_EXPERTS}
        if CHANGE + TOKENS in tensors:
            settings, per_token = self.training, routing_of(layout.checkpoint.config).per_token
            check_tokens(tensors[CHANGE + TOKENS], per_token, settings.steps * settings.batch * self.length)
        if self.fixed is None:
            fixed_point.check_floats(changes)
            return
        check_fixed(changes, counted_in(tensors), places_of(layout) if CHANGE + WEIGHTS in tensors else {}, self.weight, 1)
        for name, tensor in changes.items():
            linear = name.removeprefix(CHANGE).rpartition("/")[0]
            rank = self.ranks.get(linear, 0) if self.method.RANKED else None
            if linear and rank is not None and tensor[:, rank:].any():
                raise WireError(f"{name} has columns that this client does not train")

    def members_beyond(self, config: Config) -> str | None:
        """Whether it trains a member of a pool that the job does not have, or in a round that trains one adapter."""
        pool = config.pool
        members = 0 if pool is None or self.round < pool.common_rounds(config.rounds) else pool.most
        if (self.member is not None) != bool(members) or (self.member or 0) >= max(1, members):
            return "member"
        if config.deals_in_sums and members:
            return "member"  # the server may not know who trains it
        return "dealt" if self.dealt != (pool is not None and bool(members) and not pool.method.OF_CLIENTS) else None

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        return beyond(self, config, job.secure, len(job.clients)) or super().beyond(job)


def start_tensors(starts: Mapping[str, Start[Any]], dtype: torch.dtype, shared_a: bool) -> Tensors:
    """The tensors of a :class:`Train` request."""
    return {
        f"{kind}/{name}/{part}": value.to(dtype).contiguous()
        for name, start in starts.items()
        for kind, change in ((OWN, start.own), (REST, start.rest))
        for part, value in change.parts().items()
        if not (shared_a and part == "a")
    }
