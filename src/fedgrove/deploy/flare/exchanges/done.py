"""The run has ended: the site keeps a personal adapter, if there is one, and deletes its working files."""

from __future__ import annotations

import shutil
from typing import ClassVar

from fedgrove.deploy.flare.exchanges.join import agreed_terms
from fedgrove.deploy.flare.installation import Installation, SiteRequest
from fedgrove.rounds.request import Reply, Response, Tensors


class EndRun(SiteRequest):
    """Delete the run's working files. A personal adapter or model, where one was made, moves to ``personal/NAME``."""

    KIND: ClassVar[str] = "deploy/done"

    def respond_at(self, tensors: Tensors, site: Installation) -> Response:
        name = agreed_terms(site).name
        personal = site.folder / "personal"
        if personal.is_dir():
            target = site.personal / name
            shutil.rmtree(target, ignore_errors=True)
            site.personal.mkdir(exist_ok=True)
            personal.rename(target)
        shutil.rmtree(site.folder)
        return Response({}, Reply())
