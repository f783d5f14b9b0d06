"""What a site has: its kit, its settings, its keys, its copy of the model. Only :class:`Declared` is sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from fedgrove.client.local_client import LocalClient
from fedgrove.deploy.flare.files import Allow, SiteFile, model_folder
from fedgrove.deploy.flare.kits import KEY, ROSTER, SIGNATURE, TRUSTED, name_of
from fedgrove.errors import FedgroveError
from fedgrove.job.endpoint import LogProbs
from fedgrove.job.units import Bits, Index, Natural, Speed
from fedgrove.privacy.secagg.keys import Credentials
from fedgrove.rounds.request import Reply, Request, Response, Tensors


class Declared(Reply):
    """The capabilities that a site declares when it joins, as in its ``site.toml``. Nothing is measured yet.

    Attributes:
        endpoint: what its endpoint returns; not where it is.
        speed: "measure": it is measured later, when the stages are planned. All other attributes and values: see
            :class:`fedgrove.rounds.capabilities.Capabilities`.
    """

    memory: Natural | None = None
    speed: Speed | Literal["measure"] = 1.0
    uplink: Natural | None = None
    downlink: Natural | None = None
    bits: Annotated[tuple[Bits, ...], Field(max_length=4)] = (32, 16, 8, 4)
    endpoint: LogProbs | None = None


@dataclass(frozen=True)
class Installation:
    """A site and its working files of one run.

    Attributes:
        kit: the site's folder.
        settings: the contents of its ``site.toml``.
        run: the name of the folder with the run's working files.
        job: the job file that the operator signed and FLARE brought to this site.
    """

    kit: Path
    settings: SiteFile
    run: str
    job: Path

    @property
    def folder(self) -> Path:
        """The folder with the run's working files."""
        return self.kit / self.settings.work / self.run

    @property
    def results(self) -> Path:
        """The folder of finished models."""
        return self.kit / "results"

    @property
    def personal(self) -> Path:
        """The folder of personal adapters, apart from ``results``: no job's name can be that of another's adapter."""
        return self.kit / "personal"

    def declared(self) -> Declared:
        """The capabilities that the site declares."""
        said = self.settings.model_dump(mode="json", include=Declared.model_fields.keys() - {"endpoint"})
        endpoint = self.settings.endpoint
        return Declared.model_validate({**said, "endpoint": endpoint and endpoint.logprobs})

    def client(
        self,
        model: str,
        dtype: str = "auto",
        secure: bool = False,
        ledger: Path | None = None,
        shares: Mapping[str, str] = MappingProxyType({}),
    ) -> LocalClient:
        """The site as a client of a run.

        Args:
            model: the name of the run's model.
            dtype: the dtype in which the model is read, such as "bfloat16"; "auto": the checkpoint's own.
            ledger: the folder in which the site records what it has released for the job.
            shares: parameters of the model that share a stored tensor.
            secure: load the credentials for secure aggregation even if ``allow.secure`` is false. A client with
                credentials sends nothing about its text unless it is masked.

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
            ledger=ledger,
            shares=shares,
            endpoint=settings.endpoint,
        )


class SiteRequest(Request):
    """A request to the site itself, before or after the stages: :meth:`respond_at` handles it, not a client."""

    stage: Annotated[Index, Field(le=0)] = 0
    round: Annotated[Index, Field(le=0)] = 0

    def respond_at(self, tensors: Tensors, site: Installation) -> Response:
        """The site's half of the exchange.

        Raises:
            Refusal: the site refuses the request.
        """
        raise NotImplementedError


def credentials(kit: Path, allow: Allow) -> Credentials:
    """The site's key for secure aggregation, and the roster that the operator signed.

    The smallest group is the largest of 2, ``allow.group`` and the roster's ``min_group``.

    Raises:
        FedgroveError: a file in ``secure/`` is missing or damaged.
    """
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


def roster_number(kit: Path) -> tuple[int, str]:
    """The number and the date of a kit's roster; 0 and "" if it has none, as in kits of earlier versions."""
    try:
        roster = json.loads((kit / "secure" / ROSTER).read_text(encoding="utf-8"))
        return int(roster["number"]), str(roster["date"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""


def torch_dtype(name: str) -> torch.dtype | None:
    """The PyTorch dtype of that name; None for "auto"."""
    if name == "auto":
        return None
    dtype: torch.dtype = getattr(torch, name)
    return dtype
