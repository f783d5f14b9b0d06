"""After the last round every client may write a smaller model of its own: the experts that matter most to its text."""

from __future__ import annotations

import shutil
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedgrove.client.local_client import LocalClient
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import Line, Linears, Name
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_cut import MAX_EXPERTS, routing_of
from fedgrove.models.expert_sums import blocks_with_experts
from fedgrove.models.held import write_reduced
from fedgrove.report.words import file_name
from fedgrove.rounds.request import Reply, Response, Tensors
from fedgrove.stages.tune.client_model import TuneRequest, own_experts_folder
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.exchanges.experts import chosen, own_sums
from fedgrove.stages.tune.merging import write_merged
from fedgrove.stages.tune.parametrizations import trainable_of
from fedgrove.stages.tune.personal import hold_out
from fedgrove.stages.tune.received import by_linear, check_growth, check_linears, check_parts

REST = "rest"  # tensors of a request: the shared change


class KeepExperts(TuneRequest):
    """Write a smaller model for yourself: the shared model with the experts only that matter most to your text.

    It is written as a plain model directory to ``personal/experts-N`` of the client's folder, and nothing of it is sent.
    Tensors of the request: ``rest/<linear>/<part>``, the shared change.

    Attributes:
        parametrization: of the changes.
        masked: the linears whose zeros stay zero.
        number: of experts of every block.
        value: see :class:`~fedgrove.stages.tune.exchanges.experts.ChooseExperts`.
        base, title: for the card of the model.
    """

    KIND: ClassVar[str] = "tune/reduced"

    parametrization: Name
    masked: Linears
    number: Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
    value: Literal["outputs", "tokens"]
    base: Line
    title: Line

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        method = trainable_of(self.parametrization)
        decoder, ids, labels = self.model_and_windows(client, device)
        shapes = {name: decoder.read_shape(name) for name in decoder.linear_names()}
        check_linears(self.masked, shapes, client)
        largest = {REST: {name: 2 * min(shape) for name, shape in shapes.items()}}
        check_parts(tensors, method, shapes, largest, [torch.float64, torch.float32], False, client)
        changes = {name: method.change_of(parts) for name, parts in by_linear(tensors, REST).items()}
        check_growth(method, changes, decoder, client)
        blocks = blocks_with_experts(decoder)
        if not blocks:
            raise client.error("the request is for experts, which its model does not have; refused")
        routing = routing_of(decoder.checkpoint.config)
        if self.number not in routing.numbers:
            raise client.error(f"the request is for {self.number} experts, with which its model cannot work; refused")
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

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        """After the last round."""
        return range(config.number_of_rounds(), config.number_of_rounds() + 1)

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if not config.personal_experts:
            return "personal_experts"
        if self.parametrization != config.parametrization:
            return "parametrization"
        if self.value != config.expert_value:
            return "expert_value"
        return "held" if self.held is not None else super().beyond(job)
