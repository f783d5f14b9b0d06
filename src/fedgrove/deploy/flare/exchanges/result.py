"""Sends the finished model, file by file, to the sites that want it."""

from __future__ import annotations

import shutil
from typing import ClassVar

import torch

from fedgrove.deploy.flare.exchanges.join import agreed_terms
from fedgrove.deploy.flare.installation import Installation, SiteRequest
from fedgrove.engines.error_codes import Refusal
from fedgrove.job.units import Name
from fedgrove.rounds.request import Reply, Response, Tensors

CONTENT = "bytes"  # the name of the tensor that is sent with the request


class DeliverResult(SiteRequest):
    """Take one file of the result; with the last one the folder ``results/NAME`` is complete.

    Tensor with the request: ``bytes``, (size,) uint8.

    The model is packed; what stages made beside it, such as an adapter, is in folders of its own.

    Attributes:
        folder: where the file belongs, in the result's folder; None: in that itself.
        file: the file's name.
        last: whether it is the last one.
    """

    KIND: ClassVar[str] = "deploy/result"

    folder: Name | None = None
    file: Name
    last: bool

    def respond_at(self, tensors: Tensors, site: Installation) -> Response:
        folder = site.results / agreed_terms(site).name
        if not site.settings.result:
            raise Refusal("refused", "result")
        content = tensors.get(CONTENT)
        if content is None or content.dtype != torch.uint8:
            raise Refusal("terms", CONTENT)
        partial = folder.with_name(f".{folder.name}.partial")  # no job's name begins with a dot
        target = partial / self.folder / self.file if self.folder else partial / self.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.numpy().tobytes())
        if self.last:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        return Response({}, Reply())
