"""What the job file may say of any kind of stage, and what the rest of fedgrove asks of such a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from fedgrove import plugins
from fedgrove.job.units import Table

if TYPE_CHECKING:
    from fedgrove.job.tables import Job

STAGES = "stages"  # the package whose folders are the kinds of stage


class StageConfig(Table):
    """A table of ``[[stages]]``. A kind of stage is a folder of ``fedgrove.stages`` whose ``config.py`` derives its ``Config``.

    Nothing outside that folder looks at the keys of one kind; what the job, the planner, ``doctor``, a site and the report
    need to know of every kind are the methods below.
    """

    kind: str

    def calibration_windows(self) -> tuple[int, int] | None:
        """(windows of each client, tokens of each) that clients calibrate on; None: the stage does not calibrate."""
        return None

    def training_length(self) -> int | None:
        """Tokens of the windows that clients train on; None: the stage does not train."""
        return None

    def reads_text(self) -> bool:
        """Whether clients compute anything from their text."""
        return True

    def privacy_budget(self) -> float | None:
        """ε of what the stage promises for a client's text; None: no noise is added."""
        return None

    def methods(self) -> set[str]:
        """The names of methods that a site may allow or forbid."""
        return set()

    def changes_structure(self) -> bool:
        """Whether later stages find tensors of other shapes than the clients' own copies have."""
        return False

    def makes_zeros(self) -> bool:
        """Whether the stage leaves zeros that later stages have to keep."""
        return False

    def passes(self) -> int:
        """How many copies of the changed tensors the run folder holds at most."""
        return 1

    def hidden_states_kept(self, num_blocks: int) -> int:
        """How many blocks' hidden states of every calibration window a client keeps on its disk at most."""
        return 0

    def check(self, job: Job, index: int) -> None:
        """Refuses what does not fit the rest of the job.

        Args:
            index: the stage's place in the job.

        Raises:
            ValueError: begins with the key, such as ``stages.0.trim: …``, and says what would do.
        """

    def check_secure(self, job: Job, index: int) -> None:
        """Likewise, where the job asks for secure aggregation."""

    def centralized(self, job: Job) -> Self:
        """The same stage for one client that has everybody's text: no limits, nothing to hide, no bytes to save."""
        return self


def config_of(kind: str) -> type[StageConfig]:
    """The table of a kind of stage."""
    config: type[StageConfig] = plugins.load(f"{STAGES}.{kind}", "config").Config
    return config
