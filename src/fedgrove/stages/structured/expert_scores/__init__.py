"""Scores of experts. A new score is a new file here; its file name is its name in the job.

A score is computed from sums over tokens of text. The clients' sums add up to those over their pooled text, so the experts that
stay are those that the pooled text would keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, cast

from torch import Tensor

from fedgrove import plugins

PACKAGE = "stages.structured.expert_scores"
Sum = Literal["tokens", "outputs"]  # the number of tokens that an expert gets; Σ g·‖f‖ over them


class ExpertScore(Protocol):
    """The contract of a score's file.

    Attributes:
        SUMS: the sums that it is computed from, ``tokens`` always among them; clients send no others.
    """

    SUMS: tuple[Sum, ...]

    def finish(self, sums: Mapping[str, Tensor]) -> Tensor:
        """The scores of a block's experts, (experts,) float64, from the sums over all clients.

        The experts with the lowest scores are cut.

        Args:
            sums: of each of ``SUMS``, (experts,) float64.
        """
        ...


METHOD = ExpertScore


def expert_score_of(name: str) -> ExpertScore:
    """Loads a score by name."""
    return cast(ExpertScore, plugins.load(PACKAGE, name))
