"""Every client measures the model that it would have without the others, on held-out text that the server sends."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import checkpoint_of, decoder_of
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Name, Samples
from fedgrove.models.blocks import Decoder
from fedgrove.models.perplexity import negative_log_likelihoods
from fedgrove.rounds.request import CHANGE, WEIGHT, Disclosure, Reply, Request, Response, Tensors, TensorSpecs
from fedgrove.stages.prune.exchanges.block import PruneBlock, alone_file, prune_block

WINDOW = "window/"  # tensors of a request: token ids to evaluate on


class EvaluateAlone(Request):
    """Measure the loss of the model that you pruned by yourself, on text that the server sends.

    Tensors sent with the request: ``window/<text>/<i>``: (1, tokens) token ids. The response holds for each text two float64
    tensors (windows,): ``change/<text>``, negative log-likelihoods in nats, and ``weight/<text>``, numbers of predicted tokens.

    Attributes:
        texts: number of windows of each held-out text.
        prune: the request of the first round, to prune blocks that are not stored among the client's working files.
    """

    KIND: ClassVar[str] = "prune/alone"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.WINDOW_LOSSES})

    texts: Annotated[dict[Name, Samples], Field(max_length=1000)]
    prune: PruneBlock

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        if tensors.keys() != {f"{WINDOW}{name}/{i}" for name, number in self.texts.items() for i in range(number)}:
            raise client.error("the windows that came are not those that the request names; refused")
        for block in range(len(decoder_of(client, device))):
            if not alone_file(client, block).is_file():
                for _ in prune_block(self.prune.model_copy(update={"block": block, "keep": True}), {}, client, device, {}):
                    pass  # prune_block stores the pruned block; nothing is sent
        decoder = Decoder(checkpoint_of(client).over(alone_file(client, 0).parent), device)
        measured: Tensors = {}
        for name, number in self.texts.items():
            windows = [tensors[f"{WINDOW}{name}/{i}"].long() for i in range(number)]
            each = torch.tensor(negative_log_likelihoods(decoder, windows), dtype=torch.float64)
            measured[CHANGE + name], measured[WEIGHT + name] = each[:, 0].contiguous(), each[:, 1].contiguous()
        return Response(measured, Reply())

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        return {
            f"{part}{name}": (torch.Size([number]), torch.float64)
            for name, number in self.texts.items()
            for part in (CHANGE, WEIGHT)
        }

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return range(1)

    def beyond(self, job: Agreed) -> str | None:
        if self.prune.stage != self.stage:
            return "stage"
        if self.prune.round != 0 or self.prune.block != 0 or self.prune.fixed_point is not None:
            return "prune"
        return self.prune.pass_beyond(job)
