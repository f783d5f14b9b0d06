"""Before a stage tunes, every client is sent what earlier stages changed, a block at a time."""

from __future__ import annotations

from typing import ClassVar

from fedgrove.client.local_client import LocalClient
from fedgrove.models.stream import save_tensors
from fedgrove.rounds.request import Reply, Request, Response, Tensors
from fedgrove.stages.tune.client_model import base_folder


class KeepWeights(Request):
    """Keep these tensors, which the model of the stage has and your own copy has not. They go by their names in the checkpoint.

    Attributes:
        part: a number.
    """

    KIND: ClassVar[str] = "tune/base"

    part: int

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        save_tensors(tensors, base_folder(client, self.stage) / f"part-{self.part:05d}.safetensors")
        return Response({}, Reply())
