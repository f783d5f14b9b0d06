"""Before tuning, the server sends every client the weights that earlier stages changed, block by block."""

from __future__ import annotations

from typing import ClassVar

from fedgrove.client.local_client import LocalClient
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.request import Reply, Request, Response, Tensors
from fedgrove.stages.tune.client_model import DIGEST, base_folder


class KeepWeights(Request):
    """Store these tensors of the stage's model, which differ from your own copy. Names are those in the checkpoint.

    Attributes:
        part: index of the file in which the client stores them.
    """

    KIND: ClassVar[str] = "tune/base"

    part: int

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        file = base_folder(client, self.stage) / f"part-{self.part:05d}.safetensors"
        save_tensors(tensors, file, {DIGEST: self.sum_digest(tensors)})
        return Response({}, Reply())
