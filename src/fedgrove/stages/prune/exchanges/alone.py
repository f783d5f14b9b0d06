"""Every client measures the model that it would have without the others, on held-out text that the server sends."""

from __future__ import annotations

from typing import ClassVar

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import checkpoint_of, decoder_of
from fedgrove.evaluation.alone import MeasureAlone
from fedgrove.job.stage_config import Agreed
from fedgrove.rounds.request import Disclosure, Reply, Response, Tensors
from fedgrove.stages.prune.exchanges.block import PruneBlock, alone_file, prune_block


class EvaluateAlone(MeasureAlone):
    """Measure the loss of the model that you pruned by yourself, on text that the server sends.

    See :class:`fedgrove.evaluation.alone.MeasureAlone`.

    Attributes:
        prune: the request of the first round, to prune blocks that are not stored among the client's working files.
    """

    KIND: ClassVar[str] = "prune/alone"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.WINDOW_LOSSES})

    prune: PruneBlock

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        self.check_windows(tensors, client)
        for block in range(len(decoder_of(client, device))):
            if not alone_file(client, block).is_file():
                for _ in prune_block(self.prune.model_copy(update={"block": block, "keep": True}), {}, client, device, {}):
                    pass  # prune_block stores the pruned block; nothing is sent
        model = checkpoint_of(client).over(alone_file(client, 0).parent)
        return Response(self.measured(model, device, tensors), Reply())

    def beyond(self, job: Agreed) -> str | None:
        if self.prune.stage != self.stage:
            return "stage"
        if self.prune.round != 0 or self.prune.block != 0 or self.prune.fixed_point is not None:
            return "prune"
        return self.measuring_beyond(job) or self.prune.pass_beyond(job)
