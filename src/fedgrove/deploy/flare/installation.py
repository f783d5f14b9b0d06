"""What a site has: its kit, its settings, its keys, its copy of the model. Only what it declares is sent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from fedgrove.client.local_client import LocalClient
from fedgrove.deploy.flare.files import Allow, SiteFile, model_folder
from fedgrove.deploy.flare.kits import KEY, ROSTER, SIGNATURE, TRUSTED, name_of
from fedgrove.errors import FedgroveError
from fedgrove.job.units import Bits
from fedgrove.privacy.secagg.keys import Credentials
from fedgrove.rounds.request import Index, Reply, Request, Response, Tensors


class Declared(Reply):
    """What a site says of itself when it joins: as in its ``site.toml``, nothing is measured yet.

    Attributes:
        speed: "measure": it is measured when the stages are planned. Everything else: see
            :class:`fedgrove.rounds.capabilities.Capabilities`.
    """

    memory: Annotated[int, Field(gt=0)] | None = None
    speed: Annotated[float, Field(gt=0)] | Literal["measure"] = 1.0
    uplink: Annotated[int, Field(gt=0)] | None = None
    downlink: Annotated[int, Field(gt=0)] | None = None
    bits: tuple[Bits, ...] = (32, 16, 8, 4)


@dataclass(frozen=True)
class Installation:
    """A site, and its working files of one run.

    Attributes:
        kit: the site's folder.
        settings: its ``site.toml``.
        run: the name of the run's working files.
    """

    kit: Path
    settings: SiteFile
    run: str

    @property
    def folder(self) -> Path:
        """The run's working files."""
        return self.kit / self.settings.work / self.run

    @property
    def results(self) -> Path:
        """Where finished models are kept."""
        return self.kit / "results"

    def declared(self) -> Declared:
        """What the site says of itself."""
        return Declared.model_validate(self.settings.model_dump(mode="json", include=set(Declared.model_fields)))

    def client(self, model: str, dtype: str = "auto", secure: bool = False) -> LocalClient:
        """The site as a client of a run.

        Args:
            model: the name of the run's model.
            dtype: in which it is read.
            secure: with credentials: then it sends nothing of its text but masked, whatever it is asked.

        Raises:
            FedgroveError: the model or a credential is missing.
        """
        settings = self.settings
        capabilities: dict[str, Any] = self.declared().model_dump(mode="json")
        return LocalClient(
            name=name_of(self.kit),
            folder=self.folder,
            model=model_folder(settings.models, model, self.kit),
            dtype=torch_dtype(dtype),
            data=settings.data,
            text=settings.text,
            capabilities=capabilities,
            credentials=credentials(self.kit, settings.allow) if secure or settings.allow.secure else None,
            prompt=settings.prompt,
            answer=settings.answer,
        )


class SiteRequest(Request):
    """A request to a site itself, before the stages or after them: its client has no part in it."""

    stage: Index = 0

    def respond_at(self, tensors: Tensors, site: Installation) -> Response:
        """The site's half.

        Raises:
            Refusal: the site does not do it.
        """
        raise NotImplementedError


def credentials(kit: Path, allow: Allow) -> Credentials:
    """The site's key for secure aggregation, and the roster that the operator signed."""
    folder = kit / "secure"
    try:
        roster = (folder / ROSTER).read_bytes()
        key, signature, operator = (
            bytes.fromhex((folder / name).read_text(encoding="utf-8")) for name in (KEY, SIGNATURE, TRUSTED)
        )
        min_group = int(json.loads(roster)["min_group"])
    except (OSError, ValueError, KeyError) as error:
        raise FedgroveError(
            f"{folder}: a key, the roster or its signature is missing or damaged", "ask the operator"
        ) from error
    return Credentials(key, roster, signature, operator, max(2, allow.group, min_group))


def torch_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for "auto"."""
    if name == "auto":
        return None
    dtype: torch.dtype = getattr(torch, name)
    return dtype
