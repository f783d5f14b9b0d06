"""After the last round every client may write a smaller model of its own: the experts that matter most to its text."""

from __future__ import annotations

import shutil
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import MAX_EXPERTS
from fedgrove.models.held import write_reduced
from fedgrove.report.words import file_name
from fedgrove.rounds.request import Reply, Response, Tensors
from fedgrove.stages.tune.after_rounds import AfterRounds
from fedgrove.stages.tune.client_model import own_experts_folder
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.exchanges.experts import chosen, experts_of, own_sums
from fedgrove.stages.tune.merging import write_merged
from fedgrove.stages.tune.personal import hold_out
from fedgrove.stages.tune.received import check_growth


class KeepExperts(AfterRounds):
    """Write a smaller model for yourself: the shared model with the experts only that matter most to your text.

    It is written as a plain model directory to ``personal/experts-N`` of the client's folder, and nothing of it is sent.
    Tensors of the request: ``rest/<linear>/<part>``, the shared change.

    Attributes:
        number: of experts of every block.
        value: see :class:`~fedgrove.stages.tune.exchanges.experts.ChooseExperts`.
    """

    KIND: ClassVar[str] = "tune/reduced"

    number: Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
    value: Literal["outputs", "tokens"]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        method = self.method
        decoder, ids, labels = self.model_and_windows(client, device)
        sent = self.shared_change(tensors, decoder.linear_shapes(), [torch.float64, torch.float32], client)
        changes = {name: method.change_of(parts) for name, parts in sent.items()}
        check_growth(method, changes, decoder, client)
        blocks, routing = experts_of(decoder, self.number, client)
        (ids, _), _ = hold_out(ids, labels, self.personal)
        out, merged = own_experts_folder(client, self.stage), client.folder / f"merged-{self.stage}"
        try:
            write_merged(decoder, method, changes, self.masked, merged)
            tuned = decoder.checkpoint.over(merged)
            sums = own_sums(Decoder(tuned, device), ids, client, self.stage, f"{self.seed}/own")
            write_reduced(
                tuned, chosen(sums, blocks, self.value, self.number, routing.groups), out, {"README.md": self._card()}
            )
        finally:
            shutil.rmtree(merged, ignore_errors=True)
        return Response({}, Reply())

    def _card(self) -> str:
        base = file_name(self.base)
        return (
            f"---\nbase_model: {base}\n---\n# {self.title}\n\nThe tuned model with {self.number} experts in every block that "
            "has any: those that matter most to the text of the client that wrote it. Which they are tells something of it.\n"
        )

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if not config.personal_experts:
            return "personal_experts"
        if self.value != config.expert_value:
            return "expert_value"
        return "held" if self.held is not None else super().beyond(job)
