"""A round of steps along random directions: clients send differences of losses; before it, what a job calls "auto" is measured.

Neither a seed nor a weight travels: a direction is named by its index, and the model by its coefficients.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client import server_weights
from fedgrove.client.local_client import LocalClient
from fedgrove.errors import FedgroveError
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import MAX_CLIENTS, MOST, Count, CountOrZero, Linears, Name, NonNegative, Positive, Targets
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune import training
from fedgrove.stages.tune.aggregation import Drawing, SeedAggregation, seed_aggregation_of
from fedgrove.stages.tune.client_model import TrainingRequest
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.fixed_point import ClientNoise
from fedgrove.stages.tune.parametrizations import parametrization_of
from fedgrove.stages.tune.received import check_linears
from fedgrove.stages.tune.seeds.keys import AUTO
from fedgrove.stages.tune.seeds.moving import moving_of
from fedgrove.stages.tune.seeds.offsets import LARGEST, MOST_DIRECTIONS, Offsets
from fedgrove.stages.tune.seeds.steps import LOSS_BITS, MOST_LOSS, Steps, Taken, limit_for, whole
from fedgrove.stages.tune.seeds.targets import unknown_target
from fedgrove.stages.tune.seeds.two_sided import TwoSided, in_memory
from fedgrove.stages.tune.train_settings import WindowNoise, check_noise
from fedgrove.stages.tune.trainers import trainer_of

COEFFICIENTS, CHANCES = "coefficients", "chances"  # tensors of a request
DIFFERENCES, CURVES, SIZES = f"{CHANGE}differences", f"{CHANGE}curves", f"{CHANGE}sizes"  # tensors of a response
MEASURED = 8  # directions along which the curvature is measured, each with windows of its own
PERTURBATIONS = tuple(2.0**-k for k in range(6, 13))  # that "auto" chooses from
PER_ADAPTER = 16.0  # times as large for the entries of B
PROBES = 2**40  # the first direction that is measured along: no step goes along it


class Took(Reply):
    """The reply of a client that took a round's steps.

    Attributes:
        tokens: of its text.
        loss: the mean loss of its windows; None if only sums may be seen, if there is noise, or if no step counted.
        skipped: steps whose loss was not finite; None where the loss is.
    """

    tokens: int
    loss: NonNegative | None = None
    skipped: Annotated[int, Field(ge=0, le=MOST)] | None = None


class AlongDirections(TrainingRequest):
    """A request whose response compares losses along random directions.

    Tensors of the request: ``coefficients``, (directions,) int64: the steps so far.

    Attributes:
        batch: windows of a step.
        clients: how many clients get the request, which bounds what each may send.
        masked: the linears whose zeros stay zero.
        target_modules: the linears that move, by the ends of their names; empty: all.
        rank: of the adapters that move; 0: the weights do.
    """

    batch: Count
    clients: Annotated[int, Field(ge=1, le=MAX_CLIENTS)]
    masked: Linears
    target_modules: Targets = ()
    rank: CountOrZero = 0

    def model(self, tensors: Tensors, client: LocalClient, device: str) -> tuple[TwoSided, Tensor, Tensor]:
        """The model after the steps so far, and this client's windows.

        Raises:
            FedgroveError: the server sent coefficients that are none, or that make a weight grow too much.
        """
        decoder, ids, labels = self.model_and_windows(client, device)
        decoder = Decoder(decoder.checkpoint, device, torch.float32)  # whose weights move; others share the one that is kept
        coefficients = tensors[COEFFICIENTS]
        if coefficients.dim() != 1 or coefficients.dtype != torch.int64 or len(coefficients) > MOST_DIRECTIONS:
            raise client.error("the server sent coefficients of another shape or dtype; refused")
        if bool((coefficients.abs() > LARGEST).any()):
            raise client.error("the server sent a coefficient that no stage makes; refused")
        names = decoder.linear_names()
        check_linears(self.masked, names, client)
        if unknown_target(self.target_modules, names) is not None:
            raise client.error("the request names linears that its model does not have; refused")

        def check(name: str, before: Tensor, after: Tensor) -> None:
            server_weights.check_growth(name, before.float(), after, client)

        shapes = list(map(decoder.read_shape, decoder.linear_names()))
        if any(self.rank > min(shape) for shape in shapes):
            raise client.error("the server sent a rank that is larger than a linear allows; refused")
        whole_model = in_memory(sum(rows * columns for rows, columns in shapes))
        moving = moving_of(Offsets(client.folder / f"offsets-{self.stage}", self.seed, whole_model), self.seed, self.rank)
        model = TwoSided(decoder, moving, coefficients, self.masked, check, whole_model, self.bits, self.target_modules)
        return model, ids, labels

    def check_tensors(self, tensors: Tensors, names: set[str], client: LocalClient) -> None:
        """Refuses a request with other tensors than these."""
        if tensors.keys() != names:
            raise client.error("the server sent other tensors than coefficients; refused")

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if self.fixed is not None:
            return "fixed"
        if self.batch > max(config.batches) * len(job.clients):
            return "batches"
        if self.clients > len(job.clients):  # what others may send would not fit the sum
            return "clients"
        if self.rank != rank_of(config):
            return "ranks"
        if self.target_modules != config.target_modules:
            return "target_modules"
        return super().beyond(job)


class Step(AlongDirections):
    """Go along a direction in each of a round's steps, by the difference of the loss on either side.

    Tensors of the request, besides the coefficients: ``chances``, (seeds,) int64, for aggregations that prefer some
    directions. The response contains ``change/differences``, int32: for each direction, the sum over windows and steps of
    L₊ − L₋ in multiples of 2⁻²⁴.

    Attributes:
        aggregation: its name.
        trainer: that of this client: the job's, or its fallback.
        seeds: number of directions in the stage; 0: new ones in every round.
        steps: of the round.
        seen: how many windows this client trained on in earlier rounds.
        learning_rate, perturbation: of the steps.
        max_slope: the largest |slope| of one window, if it was measured; 0: no limit.
        says_loss: whether the reply says the loss.
        windows: the privacy budget, for trainers that add noise.
        noise: the noise that protects a client.
    """

    KIND: ClassVar[str] = "tune/seeds/step"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.LOSS_DIFFERENCES, Disclosure.LOSS})
    REPLY: ClassVar[type[Reply]] = Took
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "tokens", "batch", "seen", "trainer", "windows.noise"})

    aggregation: Name
    trainer: Name
    seeds: Annotated[int, Field(ge=0, le=MOST_DIRECTIONS)]
    steps: Count
    seen: Annotated[int, Field(ge=0, le=MOST)]
    learning_rate: NonNegative
    perturbation: Positive
    max_slope: NonNegative = 0.0
    says_loss: bool
    windows: WindowNoise | None = None
    noise: ClientNoise | None = None

    @property
    def noisy(self) -> bool:
        """Whether noise protects the response."""
        return self.windows is not None or self.noise is not None

    @property
    def method(self) -> SeedAggregation:
        """The module of the aggregation."""
        return seed_aggregation_of(self.aggregation)

    def drawing(self, client: str, chances: Tensor | None) -> Drawing:
        """From what a client's directions are drawn."""
        return Drawing(self.seeds, self.steps, self.round, f"{self.seed}/{client}", chances)

    @property
    def slope_weight(self) -> float:
        """The loss difference, in nats, that a client with a mean slope of 1 sends for a step."""
        return 2 * self.perturbation * self.batch

    def discloses(self) -> frozenset[Disclosure]:
        return self.DISCLOSES if self.says_loss else frozenset({Disclosure.LOSS_DIFFERENCES})

    def adders(self) -> int:
        return self.noise.adders if self.noise else 1

    def release(self) -> str | None:
        return f"{self.stage}/{self.round}" if self.noisy else None

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        check_noise(self.windows, self.noise, self.round, client)
        chances = tensors.get(CHANCES)
        self.check_tensors(tensors, {COEFFICIENTS} | ({CHANCES} if chances is not None else set()), client)
        if chances is not None and (
            chances.dtype != torch.int64
            or chances.shape != (self.seeds,)
            or not bool(((chances > 0) & (chances < 2**40)).all())
        ):
            raise client.error("the server sent chances that are none; refused")
        drawing = self.drawing(client.name, chances)
        directions, summed = self.method.draw(drawing), self.method.summed(drawing)
        if len(tensors[COEFFICIENTS]) <= max([*directions, *summed]):
            raise client.error("the server sent fewer coefficients than there are directions; refused")
        model, ids, labels = self.model(tensors, client, device)
        budget = training.Budget(**self.windows.model_dump()) if self.windows else None
        work = training.Work(ids, labels, self.seen, f"{self.seed}/{client.name}", budget=budget)
        limit, local = limit_for(self.clients), self.method.LOCAL_STEPS
        steps = Steps(tuple(directions), self.batch, self.learning_rate, self.perturbation, limit, self.max_slope, local)
        try:
            try:
                taken: Taken = trainer_of(self.trainer).train(model, work, steps)
            except training.NotFinite:
                if not self.noisy:
                    raise
                taken = Taken(torch.zeros(self.steps, dtype=torch.int64), None, 0)  # an error would tell something of the text
        except FedgroveError as error:
            raise client.error(error.what, error.remedy) from error
        model.flush()
        total = self._by_direction(taken.differences, directions, summed)
        says = self.says_loss and not self.noisy
        return Response(
            {DIFFERENCES: self._private(total).int()},
            Took(tokens=self.tokens, loss=taken.loss if says else None, skipped=taken.skipped if says else None),
        )

    def _by_direction(self, differences: Tensor, directions: list[int], summed: list[int]) -> Tensor:
        """The sum of the differences for each direction of the response, within the limit."""
        if directions == summed:
            return differences
        places = {direction: place for place, direction in enumerate(summed)}
        total = torch.zeros(len(summed), dtype=torch.int64)
        total.index_add_(0, torch.tensor([places[one] for one in directions]), differences)
        limit = limit_for(self.clients)
        return total.clamp(-limit, limit)

    def _private(self, total: Tensor) -> Tensor:
        """With the noise that protects a client: its slopes are clipped as one vector, and it adds its part of the noise."""
        if self.noise is None:
            return total
        mechanism, unit = self.noise.mechanism(self.slope_weight), self.slope_weight * 2.0**LOSS_BITS
        clipped = (mechanism.clip(total.double() / unit) * unit).trunc().long()
        return mechanism.add_share(clipped)

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        return {DIFFERENCES: (torch.Size([len(self.method.summed(self.drawing("", None)))]), torch.int32)}

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Took)
        self.check_tokens(reply.tokens)
        if not self.says_loss and (reply.loss is not None or reply.skipped is not None):
            raise WireError("it reports a loss that was not requested")
        if reply.skipped is not None and reply.skipped > self.steps:
            raise WireError("it skipped more steps than there are")

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        if bool((tensors[DIFFERENCES].long().abs() > limit_for(self.clients)).any()) and not self.noisy:
            raise WireError(f"{DIFFERENCES} is out of range")

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        asked = {
            "aggregation": self.aggregation, "seeds": self.seeds, "steps": self.steps,
            "says_loss": self.says_loss,
        }  # fmt: skip
        agreed = {
            "aggregation": config.aggregation, "seeds": config.seeds, "steps": config.steps,
            "says_loss": config.epsilon is None and not job.secure,
        }  # fmt: skip
        if config.learning_rate != AUTO:
            asked |= {"learning_rate": self.learning_rate, "max_slope": self.max_slope}
            agreed |= {"learning_rate": config.learning_rate_in(self.round), "max_slope": 0.0}
        if self.trainer not in (config.trainer, config.trainer_method.FALLBACK):
            return "trainer"
        if self.perturbation not in perturbations_of(config):
            return "perturbation"
        differs = next((key for key in asked if asked[key] != agreed[key]), None)
        if differs is None and self.seen > self.round * self.steps * max(config.batches) * len(job.clients):
            differs = "seen"  # else the server could have a client train on the same windows again
        return differs or self._noise_beyond(config, job) or super().beyond(job)

    def _noise_beyond(self, config: Config, job: Agreed) -> str | None:
        """Whether the request leaves out or weakens the noise that the job promises."""
        noise, other = (self.windows, self.noise) if config.trainer_method.PRIVATE else (self.noise, self.windows)
        if config.epsilon is None or noise is None or other is not None:
            return "epsilon" if config.epsilon is not None or self.noisy else None
        if (noise.epsilon, noise.delta, noise.rounds, noise.clip) != (
            config.epsilon, config.delta, config.rounds, config.dp_clip
        ):  # fmt: skip
            return "epsilon"
        return "noise" if self.noise is not None and (self.noise.adders > 0) != job.secure else None


class Measure(AlongDirections):
    """Measure along a few directions, at several distances, how your loss differs and curves, each with other windows.

    The response contains ``change/differences``, ``change/sizes`` and ``change/curves``, (perturbations, directions) int64:
    sums over windows of L₊ − L₋, of |L₊ − L₋| and of L₊ + L₋ − 2 L₀ in multiples of 2⁻²⁴, where losses that are not finite
    count as 0.

    Attributes:
        perturbations: distances.
        directions: how many.
    """

    KIND: ClassVar[str] = "tune/seeds/measure"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.CURVATURE})
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset({"bits", "tokens", "batch"})

    perturbations: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=64)]
    directions: Annotated[int, Field(ge=1, le=64)]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        self.check_tensors(tensors, {COEFFICIENTS}, client)
        model, ids, labels = self.model(tensors, client, device)
        # Windows of its own for each direction: the curvature differs more between windows than between directions.
        batches = training.draw(ids, labels, self.batch, 0, f"{self.seed}/{client.name}/measure/{self.round}")
        sides = [0.0, *(sign * one for one in self.perturbations for sign in (1, -1))]
        shape = len(self.perturbations), self.directions
        sums = {name: torch.zeros(shape, dtype=torch.int64) for name in (DIFFERENCES, SIZES, CURVES)}
        for probe in range(self.directions):
            found = model.losses(*next(batches), PROBES + probe, sides)
            finite = torch.isfinite(found)
            center, above, below = (
                whole(found.nan_to_num(0.0, 0.0, 0.0))[rows] for rows in (slice(1), slice(1, None, 2), slice(2, None, 2))
            )
            counts = finite[:1] & finite[1::2] & finite[2::2]
            sums[DIFFERENCES][:, probe] = ((above - below) * counts).sum(1)
            sums[SIZES][:, probe] = ((above - below).abs() * counts).sum(1)
            sums[CURVES][:, probe] = ((above + below - 2 * center) * counts).sum(1)
        model.flush()
        return Response(sums, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        shape = torch.Size([len(self.perturbations), self.directions])
        return dict.fromkeys((DIFFERENCES, SIZES, CURVES), (shape, torch.int64))

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        most = int(self.batch * 4 * MOST_LOSS * 2**LOSS_BITS)
        for name, tensor in tensors.items():
            if bool((tensor.abs() > most).any()):
                raise WireError(f"{name} is out of range")

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        """Before the first round, and wherever it is measured again."""
        assert isinstance(config, Config)
        return config.planning_rounds

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if config.epsilon is not None:
            return "epsilon"
        if self.round not in measuring_rounds(config):
            return "learning_rate"
        agreed = perturbations_of(config)
        if self.perturbations not in ([(one,) for one in agreed] if self.round else [agreed]):
            return "perturbations"
        return "directions" if self.directions != MEASURED else super().beyond(job)


def rank_of(config: Config) -> int:
    """The rank of the adapters that move along directions; 0: the weights do, or nothing moves along directions."""
    what = parametrization_of(config.parametrization)
    return config.ranks[-1] if what.FORM == "coefficients" and what.FROZEN else 0


def perturbations_of(config: Config) -> tuple[float, ...]:
    """The distances that :class:`Measure` asks for; larger ones for adapters, of which one unit moves a weight less."""
    if not isinstance(config.perturbation, str):
        return (config.perturbation,)
    return tuple(PER_ADAPTER * one for one in PERTURBATIONS) if rank_of(config) else PERTURBATIONS


def measuring_rounds(config: Config) -> range:
    """The rounds before which clients measure: the perturbation once, the curvature before every planning round."""
    if not config.measures_settings:
        return range(0)
    return config.planning_rounds if config.learning_rate == AUTO else range(1)


def measuring_share(perturbations: int, steps: int) -> float:
    """What it takes to measure at so many perturbations, as a part of what a round of so many steps computes."""
    return (1 + 2 * perturbations) * MEASURED / (2 * steps)
