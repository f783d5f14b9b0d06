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
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Count
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import Disclosure, Reply, Response, Tensors
from fedgrove.stages.tune.after_rounds import AfterRounds
from fedgrove.stages.tune.changes import Start
from fedgrove.stages.tune.client_model import best_folder
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.frozen import load
from fedgrove.stages.tune.parametrizations import Attachment
from fedgrove.stages.tune.personal import Windows, best, hold_out, losses
from fedgrove.stages.tune.received import check_growth


class ComparePersonal(AfterRounds):
    """Compare the losses of the shared change and of your own best change on your held-out text.

    If the client's own change is better, it is written as an adapter to ``personal/stage-N`` of the client's folder; it
    is never sent. Tensors of the request: ``rest/<linear>/<part>``, the shared change.

    Attributes:
        micro: windows computed at once.
    """

    KIND: ClassVar[str] = "tune/personal"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.HELD_OUT_LOSSES})
    REPLY: ClassVar[type[Reply]] = Losses

    micro: Count

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        method = self.method
        decoder, ids, labels = self.model_and_windows(client, device)
        _, held_out = hold_out(ids, labels, self.personal)
        best_adapter = best(best_folder(client, self.stage), method)
        if held_out is None or best_adapter is None:
            return Response({}, Losses(shared=None, own=None))
        chosen_by, changes = best_adapter
        shapes = decoder.linear_shapes()
        sent = self.shared_change(tensors, shapes, [torch.float32, torch.bfloat16], client)
        starts = {name: method.start({}, of, shapes[name], 0, name, self.seed) for name, of in sent.items()}
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

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if not config.personal:
            return "personal"
        return "micro" if self.micro > max(config.batches) else super().beyond(job)

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Losses)
        reply.check()
