"""Before tuning, the server sends every client the weights that earlier stages changed, block by block."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fedgrove.client.local_client import LocalClient
from fedgrove.job.units import MAX_BLOCKS, Index
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.request import Reply, Request, Response, Tensors
from fedgrove.stages.tune.client_model import base_folder


class KeepWeights(Request):
    """Store these tensors of the stage's model, which differ from your own copy. Names are those in the checkpoint.

    Attributes:
        part: index of the file in which the client stores them.
    """

    KIND: ClassVar[str] = "tune/base"

    part: Annotated[Index, Field(lt=MAX_BLOCKS)]

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        save_tensors(tensors, base_folder(client, self.stage) / f"part-{self.part:05d}.safetensors")
        return Response({}, Reply())
