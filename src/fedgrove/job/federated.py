"""The job file of a federation: a job whose clients are sites, which set what is theirs in files of their own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedgrove.job.tables import Client, Job
from fedgrove.job.units import MAX_CLIENTS, CountOrZero, File


class FederatedClient(Client):
    """``[[clients]]`` in a federation: only a name; each site sets everything else in its own file."""

    data: tuple[File, ...] = ()


class FederatedJob(Job):
    """A job for the sites of a federation.

    Attributes:
        result: "server": the model stays on the server, and operators fetch it; "sites": it is also sent to the sites
            that want it.
        roster: the number of the roster of the sites' keys, for secure aggregation; `fedgrove federation submit` fills it in.
    """

    clients: Annotated[tuple[FederatedClient, ...], Field(min_length=1, max_length=MAX_CLIENTS)]
    result: Literal["server", "sites"] = "server"
    roster: CountOrZero = 0

    @model_validator(mode="before")
    @classmethod
    def _brings_no_code(cls, value: Any) -> Any:
        """Looks at the key before its path is looked up, so that nobody learns which paths the server has."""
        evaluate = value.get("evaluate") if isinstance(value, dict) else None
        if isinstance(evaluate, dict) and evaluate.get("new"):
            raise ValueError(
                "evaluate.new: in a federation no owner's text is at the server; leave it out, and let the owner use "
                "`fedgrove adopt`"
            )
        if isinstance(evaluate, dict) and evaluate.get("tasks_from") is not None:
            raise ValueError(
                "evaluate.tasks_from: a folder of tasks is code, and nobody brings code to the server of a federation; leave "
                "it out, and name tasks that the server allows (tasks in its server.toml)"
            )
        return value

    @model_validator(mode="after")
    def _keeps_text_apart(self) -> FederatedJob:
        if self.evaluate.centralized:
            raise ValueError("evaluate.centralized: in a federation no text may be put in one place; set it to false")
        if self.model.endpoint is not None:
            raise ValueError(
                "model.endpoint: in a federation each site says where its text goes, as [endpoint] of its site.toml; remove it"
            )
        return self
