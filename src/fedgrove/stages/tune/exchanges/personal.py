"""After the last round every client compares the shared change with its own best one, and keeps the better one."""

from __future__ import annotations

import math
import shutil
from typing import ClassVar

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Count, Line, Linears, Name, NonNegative
from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.request import Disclosure, Reply, Response, Tensors
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.client_model import TuneRequest, best_folder
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.frozen import load
from fedgrove.stages.tune.parametrizations import Attachment, parametrization_of
from fedgrove.stages.tune.personal import best, hold_out, mean_loss
from fedgrove.stages.tune.received import check_growth, check_parts, parts_of

REST = "rest"  # tensors of a request: the shared change


class Losses(Reply):
    """Mean losses per token on the client's held-out windows; None if it has none, or no own change."""

    shared: NonNegative | None
    own: NonNegative | None


class ComparePersonal(TuneRequest):
    """Compare the losses of the shared change and of your own best change on your held-out text.

    If the client's own change is better, it is written as an adapter to ``personal/stage-N`` of the client's folder; it
    is never sent. Tensors of the request: ``rest/<linear>/<part>``, the shared change.

    Attributes:
        parametrization: of the changes.
        masked: the linears whose zeros stay zero.
        micro: windows computed at once.
        base, title: for the card of the personal adapter.
    """

    KIND: ClassVar[str] = "tune/personal"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.HELD_OUT_LOSSES})
    REPLY: ClassVar[type[Reply]] = Losses

    parametrization: Name
    masked: Linears
    micro: Count
    base: Line
    title: Line

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        method = parametrization_of(self.parametrization)
        decoder, ids, labels = self.model_and_windows(client, device)
        _, held_out = hold_out(ids, labels, self.personal)
        best_adapter = best(best_folder(client, self.stage), method)
        if held_out is None or best_adapter is None:
            return Response({}, Losses(shared=None, own=None))
        own, changes = best_adapter
        shapes = {name: decoder.read_shape(name) for name in decoder.linear_names()}
        if not set(self.masked) <= shapes.keys():
            raise client.error("the request names linears that its model does not have; refused")
        largest = {REST: {name: 2 * min(shape) for name, shape in shapes.items()}}
        check_parts(tensors, method, shapes, largest, [torch.float32, torch.bfloat16], False, client)
        named = sorted({key.split("/")[1] for key in tensors})
        starts = {name: method.start({}, parts_of(tensors, REST, name), shapes[name], 0, name, self.seed) for name in named}
        check_growth(method, {name: begun.rest for name, begun in starts.items()}, decoder, client)
        masks = {name: decoder.read_matrix(name) != 0 for name in self.masked}
        model = load(decoder, self.bits)
        method.attach(model, starts, Attachment({}, masks))
        shared = mean_loss(model, held_out, self.micro)
        out = client.folder / "personal" / f"stage-{self.stage}"
        if own < shared:
            plain = Decoder(Checkpoint(client.model, client.dtype, kept_blocks=self.kept_blocks))
            is_changed = self.parts > 0 or self.kept_blocks is not None
            method.write_adapter(out, plain, changes, self.base, self.title, pruned=bool(masks), changed=is_changed)
        else:
            shutil.rmtree(out, ignore_errors=True)
        return Response({}, Losses(shared=shared, own=own))

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        """After the last round."""
        return range(config.number_of_rounds(), config.number_of_rounds() + 1)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if not config.personal:
            return "personal"
        if self.parametrization != config.parametrization:
            return "parametrization"
        return "micro" if self.micro > max(config.batches) else super().beyond(job)

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Losses)
        losses = [reply.shared, reply.own]
        if losses != [None, None] and not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
            raise WireError("its losses are not finite numbers")
