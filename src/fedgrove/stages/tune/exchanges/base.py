"""Before tuning, the server sends every client the weights that earlier stages changed, block by block.

The client's text will pass through these weights, so a client does not take them as they come: a model of the server's
own choice could make the trained change reveal the text (Fowl et al., ICLR 2023). Only linears of blocks may change, only
after an earlier stage, zeros stay zeros, and no weight matrix may grow beyond :data:`GROWTH` times its norm.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import decoder_of
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.units import MAX_BLOCKS, Index
from fedgrove.models.blocks import Decoder
from fedgrove.models.experts import slices
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.request import Reply, Request, Response, Tensors
from fedgrove.stages.tune.changes import FEW_ZEROS
from fedgrove.stages.tune.client_model import DIGEST, base_folder

GROWTH = 2.0  # the largest norm of a changed tensor, in units of the norm of the client's own


class KeepWeights(Request):
    """Store these tensors of the stage's model, which differ from your own copy. Names are those in the checkpoint.

    Attributes:
        part: index of the file in which the client stores them.
    """

    KIND: ClassVar[str] = "tune/base"

    part: Annotated[Index, Field(lt=MAX_BLOCKS)]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        decoder = decoder_of(client, device)
        linears = set(decoder.linear_names().values())
        for name, tensor in tensors.items():
            if not _is_of_linear(name, tensor, linears) or name not in decoder.checkpoint:
                raise client.error(f"the server sent other weights for {name}, which no stage changes; refused")
            check_change(decoder, name, tensor, client)
        file = base_folder(client, self.stage) / f"part-{self.part:05d}.safetensors"
        save_tensors(tensors, file, {DIGEST: self.sum_digest(tensors)})
        return Response({}, Reply())

    @classmethod
    def rounds_in(cls, config: StageConfig) -> range:
        return range(1)

    def beyond(self, job: Agreed) -> str | None:
        return "stage" if self.stage == 0 else None  # before the first stage no weight has changed


def check_change(decoder: Decoder, name: str, tensor: Tensor, client: LocalClient) -> None:
    """Refuses a tensor that no stage makes of the client's own one.

    Args:
        decoder: the client's own copy of the model.
        name: of the tensor in the checkpoint.
        tensor: from the server; smaller than the client's own after structured pruning.

    Raises:
        FedgroveError: the tensor is not finite, larger than the client's own, has grown, or has weights where the
            client's own has zeros.
    """
    own = decoder.checkpoint.read(name).float()
    new = tensor.float()
    if new.dim() != own.dim() or any(size > own_size for size, own_size in zip(new.shape, own.shape, strict=True)):
        raise client.error(f"the server sent weights of another shape for {name}; refused")
    if not bool(torch.isfinite(new).all()) or float(new.norm()) > GROWTH * float(own.norm()):
        raise client.error(f"the server sent weights for {name} that grew more than {GROWTH:g} times; refused")
    zeros = own == 0
    if new.shape == own.shape and float(zeros.float().mean()) > FEW_ZEROS and bool((new[zeros] != 0).any()):
        raise client.error(f"the server sent weights for {name} where its own are zero; refused")


def _is_of_linear(name: str, tensor: Tensor, linears: set[str]) -> bool:
    """Whether a tensor is the weight or the bias of a linear of a block, or holds the weights of its experts."""
    experts = slices(name, tensor.shape)
    is_bias = name.endswith(".bias") and name.removesuffix("bias") + "weight" in linears
    return name in linears or is_bias or (bool(experts) and experts.keys() <= linears)
