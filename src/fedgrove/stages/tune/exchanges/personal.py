"""After the last round every client compares the shared change with its own best one, and keeps the better one."""

from __future__ import annotations

import math
import shutil
from typing import ClassVar

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
        named = {*self.masked, *(name.split("/")[1] for name in tensors if name.count("/") == 2)}
        if not named <= set(decoder.linear_names()):
            raise client.error("the request names linears that its model does not have; refused")
        masks = {name: decoder.read_matrix(name) != 0 for name in self.masked}
        model = load(decoder, self.bits)
        starts = {}
        for name in sorted({key.split("/")[1] for key in tensors}):
            parts = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.startswith(f"rest/{name}/")}
            starts[name] = method.start({}, parts, decoder.read_shape(name), 0, name, self.seed)
        method.attach(model, starts, Attachment({}, masks))
        shared = mean_loss(model, held_out, self.micro)
        out = client.folder / "personal" / f"stage-{self.stage}"
        if own < shared:
            plain = Decoder(Checkpoint(client.model, client.dtype))
            method.write_adapter(out, plain, changes, self.base, self.title, pruned=bool(masks), changed=self.parts > 0)
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
