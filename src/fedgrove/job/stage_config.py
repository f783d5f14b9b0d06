"""The base class of a stage's table in the job file, with the methods that the rest of fedgrove calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from fedgrove import plugins
from fedgrove.job.units import MAX_CLIENTS, ComputeDtype, Name, Sparsity, Table

if TYPE_CHECKING:
    from fedgrove.job.tables import Job

STAGES = "stages"  # the package whose subpackages are the kinds of stage


@dataclass(frozen=True)
class Cut:
    """What a stage cuts out of the model, as fractions.

    Attributes:
        channels, heads: of every block's MLP channels and groups of heads.
        depth: of the blocks.
        experts: of every block's experts.
    """

    channels: Sparsity
    heads: Sparsity
    depth: Sparsity
    experts: Sparsity = 0.0

    @staticmethod
    def whole(fraction: float, number: int) -> int:
        """How many of a number go: the fraction of it, rounded down."""
        return math.floor(fraction * number)


class StageConfig(Table):
    """A table of ``[[stages]]``. A kind of stage is a folder of ``fedgrove.stages`` whose ``config.py`` derives its ``Config``.

    No code outside that folder reads the keys of one kind. What the job, the planner, ``doctor``, a site and the report
    need to know about every kind is given by the methods below.

    Attributes:
        clients: the names of the clients that take part in the stage; the others go on from its result in the stages that
            follow. Default: all.
    """

    kind: str
    clients: Annotated[tuple[Name, ...], Field(max_length=MAX_CLIENTS)] = ()

    def takes_part(self, client: str) -> bool:
        """Whether a client has work in this stage."""
        return not self.clients or client in self.clients

    def refuse_without(self, needs: Mapping[str, str]) -> None:
        """Refuses keys that differ from their defaults and have no effect: whoever sets one expects an effect.

        Args:
            needs: key -> the other key without which it has none, and which is not set.

        Raises:
            ValueError: begins with the key and gives the remedy.
        """
        for key, other in needs.items():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: it has no effect without {other}; set {other} as well, or leave it out")

    def calibration_windows(self) -> tuple[int, int] | None:
        """(windows of each client, tokens of a window) for calibration; None: the stage does not calibrate."""
        return None

    def training_length(self) -> int | None:
        """Tokens of the windows that clients train on; None: the stage does not train."""
        return None

    def number_of_rounds(self) -> int:
        """How many rounds the stage has."""
        return 1

    def highest_round(self) -> int:
        """The highest round of any exchange; those before a training may count further than it has rounds."""
        return self.number_of_rounds() - 1

    def reads_text(self) -> bool:
        """Whether clients compute anything from their text."""
        return True

    def privacy_budget(self) -> tuple[float, float] | None:
        """(ε, δ) of the stage's differential privacy; None: no noise is added."""
        return None

    def noise_of_others(self, secure: bool) -> bool:
        """Whether a client's response alone has less noise than the budget needs: others add the rest, or the server all.

        Args:
            secure: whether only the sum of the responses can be seen.
        """
        return False

    def methods(self) -> set[str]:
        """The names of methods that a site may allow or forbid."""
        return set()

    def measures(self) -> frozenset[str]:
        """What the stage itself measures on held-out texts: values of ``measure`` of ``[[evaluate.data]]``."""
        return frozenset()

    def cuts(self) -> Cut | None:
        """What the stage cuts out of the model, whose shapes then differ from those of the clients' copies; None: nothing."""
        return None

    def leaves_pool(self) -> bool:
        """Whether the stage leaves a pool of adapters, from which owners who were not there get one."""
        return False

    def makes_zeros(self) -> bool:
        """Whether the stage makes zeros that later stages have to keep."""
        return False

    def passes(self) -> int:
        """The largest number of copies of the changed tensors in the run folder."""
        return 1

    def hidden_states_kept(self, num_blocks: int) -> int:
        """The largest number of blocks whose hidden states, of all calibration windows, a client caches on disk."""
        return 0

    def models_kept(self) -> int:
        """The largest number of models of its own that each client has on its disk."""
        return 0

    def check(self, job: Job, index: int) -> None:
        """Refuses settings that contradict the rest of the job.

        Args:
            index: the stage's index in the job, from 0.

        Raises:
            ValueError: a setting does not fit; begins with the key, such as ``stages.0.trim: …``, and gives the remedy.
        """

    def check_clients(self, job: Job, index: int) -> None:
        """Refuses clients of the stage that the job does not have, and what would compare all of them.

        Raises:
            ValueError: begins with the key and gives the remedy.
        """
        key, names = f"stages.{index}.clients", [client.name for client in job.clients]
        for name in self.clients:
            if name not in names or self.clients.count(name) > 1:
                what = "there twice" if name in names else "no client of the job"
                raise ValueError(f"{key}: '{name}' is {what}; name some of {', '.join(names)}")
        for other in ("alone", "centralized"):
            if self.clients and getattr(job.evaluate, other):
                raise ValueError(f"evaluate.{other}: {key} leaves clients out, so there is nothing to compare; set it to false")

    def check_only_stage(self, job: Job, index: int) -> None:
        """Refuses a job with other stages, for a kind that fits something to the model as the clients have it.

        Raises:
            ValueError: there are others.
        """
        if len(job.stages) > 1:
            raise ValueError(
                f'stages.{index}.kind: "{self.kind}" fits the model that the clients have, not one that another stage changes; '
                "make it the only stage"
            )

    def check_answers(self, job: Job, what: str, example: str, otherwise: str = "") -> None:
        """Refuses clients whose records have no template of what should follow them.

        In a federation each site gives its own, and its response is the error.

        Args:
            what: what follows, such as "labels".
            example: of the template ``answer``.
            otherwise: another remedy, with what comes before it.

        Raises:
            ValueError: a client has none.
        """
        for number, client in enumerate(job.clients):
            if client.data and client.answer is None:
                raise ValueError(
                    f"clients.{number}: client '{client.name}' has no {what}; give prompt and answer, such as "
                    f'prompt = "{{text}}" and answer = "{example}"{otherwise}'
                )

    def check_secure(self, job: Job, index: int) -> None:
        """As :meth:`check`, for a job with secure aggregation."""

    def centralized(self, job: Job) -> Self:
        """The same stage for one client with everybody's text: no resource limits, no privacy, no communication."""
        return self


@dataclass(frozen=True)
class Agreed:
    """The job that a site agreed to, as far as what it may be asked depends on it.

    Attributes:
        stages: the tables of the job's stages.
        seed: the job's.
        clients: the names of the clients that may take part.
        client: the site's own name.
        secure: whether sums are computed under secure aggregation.
        alone: whether clients measure their own models (``evaluate.alone``).
        measured_in: the dtype in which they do (``evaluate.compute_dtype``).
    """

    stages: Sequence[StageConfig]
    seed: int
    clients: Sequence[str]
    client: str
    secure: bool
    alone: bool
    measured_in: ComputeDtype | None = None

    def seed_of(self, stage: int) -> str:
        """The seed of a stage."""
        return f"{self.seed}/{stage}"

    def of_stage(self, stage: int) -> Agreed:
        """The same, with the clients of a stage alone."""
        return replace(self, clients=tuple(filter(self.stages[stage].takes_part, self.clients)))

    def own_stages(self) -> list[tuple[int, StageConfig]]:
        """The stages in which the site takes part, with their indices."""
        return [(index, stage) for index, stage in enumerate(self.stages) if stage.takes_part(self.client)]


def cut_by(stages: Sequence[StageConfig]) -> Cut | None:
    """What stages cut out of the model; None: nothing. At most one of a job's stages cuts."""
    return next((cut for cut in (stage.cuts() for stage in stages) if cut is not None), None)


def config_of(kind: str) -> type[StageConfig]:
    """The class of a kind's table.

    Raises:
        FedgroveError: there is no such kind.
    """
    config: type[StageConfig] = plugins.load(f"{STAGES}.{kind}", "config").Config
    return config
