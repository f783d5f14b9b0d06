"""A client's own side: what it has, and where. None of this is ever sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedgrove.errors import FedgroveError
from fedgrove.privacy.secagg.keys import Credentials


@dataclass(frozen=True)
class LocalClient:
    """What a client has.

    Attributes:
        name: the client's name.
        folder: its own disk, for hidden states between requests.
        model: its copy of the model.
        dtype: read the model in this dtype; None: as it is.
        data: its text files.
        text: how a record becomes text.
        capabilities: what it says of itself; see :class:`fedgrove.rounds.capabilities.Capabilities`.
        credentials: its key and the roster for secure aggregation. A client that has them sends nothing of its text but
            masked, whatever it is asked.
        prompt, answer: instead of ``text`` where a stage tunes: only the answer is learnt.
        owners: instead of ``data``, in a simulation: the clients whose windows this one has; see :mod:`fedgrove.centralized`.
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

    def error(self, what: str, remedy: str | None = None) -> FedgroveError:
        """An error of this client, in one line that names it."""
        return FedgroveError(what, remedy, client=self.name)
