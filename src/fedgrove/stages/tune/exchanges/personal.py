"""After the last round every client compares the shared change with its own best one, and keeps the better one.

It chooses by one half of its held-out windows and reports losses on the other half.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import checkpoint_of
from fedgrove.evaluation.held_out import Losses, Parts, error_of_difference, mean_of
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Count, Line, Linears, Name
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import Disclosure, Reply, Response, Tensors
from fedgrove.stages.tune.changes import Start
from fedgrove.stages.tune.client_model import TuneRequest, best_folder
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.frozen import load
from fedgrove.stages.tune.parametrizations import Attachment, trainable_of
from fedgrove.stages.tune.personal import Windows, best, hold_out, losses
from fedgrove.stages.tune.received import by_linear, check_growth, check_linears, check_parts

REST = "rest"  # tensors of a request: the shared change


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
        method = trainable_of(self.parametrization)
        decoder, ids, labels = self.model_and_windows(client, device)
        _, held_out = hold_out(ids, labels, self.personal)
        best_adapter = best(best_folder(client, self.stage), method)
        if held_out is None or best_adapter is None:
            return Response({}, Losses(shared=None, own=None))
        chosen_by, changes = best_adapter
        shapes = {name: decoder.read_shape(name) for name in decoder.linear_names()}
        check_linears(self.masked, shapes, client)
        largest = {REST: {name: 2 * min(shape) for name, shape in shapes.items()}}
        check_parts(tensors, method, shapes, largest, [torch.float32, torch.bfloat16], False, client)
        starts = {
            name: method.start({}, of, shapes[name], 0, name, self.seed)
            for name, of in sorted(by_linear(tensors, REST).items())
        }
        check_growth(method, {name: begun.rest for name, begun in starts.items()}, decoder, client)
        masks = {name: decoder.read_matrix(name) != 0 for name in self.masked}

        def measure(of: Mapping[str, Start[Any]], *windows: Windows) -> list[Parts]:
            """The losses of the model with these changes, loaded anew: there is memory for one model."""
            model = load(decoder, self.bits)
            method.attach(model, of, Attachment({}, masks))
            return [losses(model, one) for one in windows]

        to_choose, shared = measure(starts, held_out.choose, held_out.report)
        parts = {name: change.parts() for name, change in changes.items()}
        own_starts = {name: method.start({}, of, shapes[name], 0, name, self.seed) for name, of in parts.items()}
        (own,) = measure(own_starts, held_out.report)
        keeps_own = chosen_by < mean_of(to_choose)
        out = client.folder / "personal" / f"stage-{self.stage}"
        if keeps_own:
            plain = Decoder(checkpoint_of(client).over(kept_blocks=self.kept_blocks))
            is_changed = self.parts > 0 or self.kept_blocks is not None
            method.write_adapter(out, plain, changes, self.base, self.title, pruned=bool(masks), changed=is_changed)
        else:
            shutil.rmtree(out, ignore_errors=True)
        error = error_of_difference(own, shared)
        return Response({}, Losses(shared=mean_of(shared), own=mean_of(own), error=error, keeps_own=keeps_own))

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
        reply.check()
