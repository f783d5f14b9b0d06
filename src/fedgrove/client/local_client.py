"""What a client has: text, model, folder, keys. Its text, paths and private keys are never sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedgrove.errors import FedgroveError
from fedgrove.job.endpoint import Endpoint
from fedgrove.privacy.secagg.keys import Credentials


@dataclass(frozen=True)
class LocalClient:
    """What a client has.

    Attributes:
        name: the client's name.
        folder: a folder on its own disk for files between requests, such as hidden states.
        model: the folder of its copy of the model.
        dtype: read the model in this dtype; None: the checkpoint's own.
        data: its text files.
        text: the template by which a record becomes text; None: the default.
        capabilities: what it reports about itself; see :class:`fedgrove.rounds.capabilities.Capabilities`.
        credentials: its key and the roster for secure aggregation. A client with credentials responds to
            requests that disclose more than its capabilities only under secure aggregation.
        prompt, answer: templates instead of ``text`` in stages that tune: only the answer is trained on.
        owners: in a simulation, instead of ``data``: the clients whose windows this client uses; see
            :mod:`fedgrove.centralized`.
        shares: parameters of the model that share a stored tensor; see :mod:`fedgrove.models.shared`.
        ledger: where it records its noisy responses, and the clients of each secure sum; default: ``folder``, which a
            site removes after the run.
        endpoint: the completions server that runs the model in stages that look for a prompt; None: the client does.
    """

    name: str
    folder: Path
    model: Path
    dtype: torch.dtype | None
    data: tuple[Path, ...]
    text: str | None
    capabilities: dict[str, Any] = field(default_factory=dict)
    credentials: Credentials | None = None
    prompt: str | None = None
    answer: str | None = None
    owners: tuple[LocalClient, ...] = ()
    ledger: Path | None = None
    shares: Mapping[str, str] = field(default_factory=dict)
    endpoint: Endpoint | None = None

    @property
    def records(self) -> Path:
        """The folder in which the client records its noisy responses."""
        return self.ledger or self.folder

    def error(self, what: str, remedy: str | None = None) -> FedgroveError:
        """An error of this client, in one line that names it."""
        return FedgroveError(what, remedy, client=self.name)
