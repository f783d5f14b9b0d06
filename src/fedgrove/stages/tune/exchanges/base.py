"""Before tuning, the server sends every client the weights that earlier stages changed, block by block.

The client's text will pass through these weights, so a client does not take them as they come: only linears of blocks may
change, only after an earlier stage, and only within the bounds of :mod:`fedgrove.client.server_weights`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.client.server_weights import check_change, check_kept_blocks
from fedgrove.client.windows import decoder_of
from fedgrove.job.stage_config import Agreed, Cut, StageConfig, cut_by
from fedgrove.job.units import MAX_BLOCKS, Index
from fedgrove.models.depth import KeptBlocks
from fedgrove.models.expert_cut import SentExperts
from fedgrove.models.experts import slices
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.request import Reply, Request, Response, Tensors
from fedgrove.stages.tune.client_model import DIGEST, base_folder, kept_of


class KeepWeights(Request):
    """Store these tensors of the stage's model, which differ from your own copy. Names are those in the checkpoint.

    Attributes:
        part: index of the file in which the client stores them.
        cut: the fractions that earlier stages cut out of the client's own copy of the model; None: nothing.
        kept_blocks, kept_experts: the indexes of the blocks, and of their experts, of its own copy that the model has, by whose
            order names are numbered; None: all.
    """

    KIND: ClassVar[str] = "tune/base"

    part: Annotated[Index, Field(lt=MAX_BLOCKS)]
    cut: Cut | None = None
    kept_blocks: KeptBlocks | None = None
    kept_experts: SentExperts | None = None

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        check_kept_blocks(self.kept_blocks, self.cut, client)
        kept_experts = kept_of(client, self.kept_experts, self.cut)
        decoder = decoder_of(client, device, kept_blocks=self.kept_blocks, kept_experts=kept_experts)
        linears = set(decoder.linear_names().values())
        for name, tensor in tensors.items():
            if not _is_of_linear(name, tensor, linears) or name not in decoder.checkpoint:
                raise client.error(f"the server sent other weights for {name}, which no stage changes; refused")
            check_change(name, decoder.checkpoint.read(name), tensor, client)
        file = base_folder(client, self.stage) / f"part-{self.part:05d}.safetensors"
        save_tensors(tensors, file, {DIGEST: self.sum_digest(tensors)})
        return Response({}, Reply())

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return range(1)

    def beyond(self, job: Agreed) -> str | None:
        cut = cut_by(job.stages[: self.stage])
        if self.cut != cut:
            return "cut"
        if (self.kept_blocks is not None) != bool(cut and cut.depth):
            return "kept_blocks"
        if (self.kept_experts is not None) != bool(cut and cut.experts):
            return "kept_experts"
        return None if self.stage else "stage"  # before the first stage no weight has changed


def _is_of_linear(name: str, tensor: Tensor, linears: set[str]) -> bool:
    """Whether a tensor is the weight or the bias of a linear of a block, or holds the weights of its experts."""
    experts = slices(name, tensor.shape)
    is_bias = name.endswith(".bias") and name.removesuffix("bias") + "weight" in linears
    return name in linears or is_bias or (bool(experts) and experts.keys() <= linears)
