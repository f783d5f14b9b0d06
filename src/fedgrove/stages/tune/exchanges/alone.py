"""Every client trains on its own text for as many steps as with the others, but alone, and measures the model that it gets.

It measures on held-out text that the server sends, as after pruning, and on the windows that it held out for itself.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field

from fedgrove.client.local_client import LocalClient
from fedgrove.evaluation.alone import MeasureAlone
from fedgrove.evaluation.held_out import mean_of
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import NonNegative
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import Disclosure, Reply, Response, Tensors
from fedgrove.stages.tune.client_model import alone_folder
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.exchanges.train import Train
from fedgrove.stages.tune.frozen import load
from fedgrove.stages.tune.merging import write_merged
from fedgrove.stages.tune.parametrizations import Attachment
from fedgrove.stages.tune.personal import hold_out, losses
from fedgrove.stages.tune.received import check_linears
from fedgrove.stages.tune.trainers import trainer_of
from fedgrove.stages.tune.training import Settings


class OwnLoss(Reply):
    """The mean loss per token on the half of its held-out windows that a client reports on; None if it holds out none."""

    own: NonNegative | None = None


class EvaluateAlone(MeasureAlone):
    """Train alone for as many steps as with the others, and measure that model on text that the server sends.

    See :class:`fedgrove.evaluation.alone.MeasureAlone`.

    Attributes:
        train: the request of the first round; it brings no tensors.
        learning_rates: of each round. The optimizer's state is reset in every round, as in training with the others.
    """

    KIND: ClassVar[str] = "tune/alone"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.WINDOW_LOSSES, Disclosure.HELD_OUT_LOSSES})
    REPLY: ClassVar[type[Reply]] = OwnLoss

    train: Train
    learning_rates: Annotated[tuple[NonNegative, ...], Field(min_length=1, max_length=2**20)]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        self.check_windows(tensors, client)
        train, method = self.train, self.train.method
        decoder, ids, labels = train.model_and_windows(client, device)
        windows, held_out = hold_out(ids, labels, train.personal)
        check_linears({*train.ranks, *train.masked}, decoder.shapes_of_all(), client)
        shapes = decoder.linear_shapes()
        masks = {name: decoder.read_matrix(name) != 0 for name in train.masked if name in shapes}
        starts = {
            name: method.start({}, {}, shape, train.ranks.get(name, 0), name, train.seed) for name, shape in shapes.items()
        }
        model = load(decoder, train.bits)
        work = train.work(windows, method.attach(model, starts, Attachment(train.scales, masks, train.shared_a)), model, client)
        for round_, rate in enumerate(self.learning_rates):
            seen = round_ * train.training.steps * train.training.batch
            settings = Settings(**{**train.training.model_dump(), "learning_rate": rate})
            trainer_of(train.trainer).train(model, replace(work, seen=seen), settings)
        own = mean_of(losses(model, held_out.report)) if held_out else None
        trained = method.detach(model, [name for name in train.ranks if name in shapes], starts)
        totals = {name: method.total(trained[name], starts[name]) for name in trained}
        plain = Decoder(decoder.checkpoint, device)
        del model, decoder, work  # there is memory for one model
        folder = alone_folder(client, self.stage)
        write_merged(plain, method, totals, masks.keys(), folder)
        measured = self.measured(plain.checkpoint.over(folder), device, tensors)
        shutil.rmtree(folder)
        return Response(measured, OwnLoss(own=own))

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        train = self.train
        if (train.stage, train.round, train.seen, train.parts) != (self.stage, 0, 0, 0):
            return "train"
        if list(self.learning_rates) != [config.learning_rate_in(round_) for round_ in range(config.rounds)]:
            return "learning_rate"
        one_adapter = [stage.model_copy(update={"pool": None}) if stage is config else stage for stage in job.stages]
        return self.measuring_beyond(job) or train.beyond(replace(job, stages=one_adapter))
