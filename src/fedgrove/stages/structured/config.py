"""``[[stages]]`` of ``kind = "structured"``: the keys of a stage that cuts channels, heads, blocks and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import model_validator

from fedgrove.job.stage_config import Cut, StageConfig
from fedgrove.job.units import Length, Samples, Sparsity, method_of
from fedgrove.stages.structured import expert_scores
from fedgrove.stages.structured.scores import PACKAGE

if TYPE_CHECKING:
    from fedgrove.job.tables import Job


class Config(StageConfig):
    """``[[stages]]`` of ``kind = "structured"``: whole channels, attention heads, blocks or experts are cut.

    Attributes:
        kind: what the stage does.
        channels: the fraction of every block's MLP channels to cut, rounded down to whole ones; 0 by default beside ``depth``
            and ``experts``.
        heads: the fraction of every block's groups of heads to cut, rounded down to whole ones; a group is a key-value head
            with the query heads that share it; 0 by default beside ``depth`` and ``experts``.
        depth: the fraction of the blocks to cut, rounded down to whole ones: those that change the hidden states of the
            clients' text least (ShortGPT's block influence).
        contiguous: cut blocks that follow each other, instead of the single blocks of least influence.
        protect_ends: never cut the first and the last block.
        repair: solve anew for the linears that read channels and heads of which some were cut, by sums of products of their
            inputs.
        score: how the importance of a channel or group of heads is measured: "diagonal_fisher" (LLM-Pruner's score of its
            single weights), "fisher" (squared changes of the loss, with less time and memory) or "taylor" (LLM-Pruner's score
            of a group as a whole).
        experts: the fraction of every block's experts to cut, rounded down to whole ones (in each group of experts, if the
            router chooses groups first); only of mixtures of experts, and not beside channels, heads or depth.
        expert_score: how the importance of an expert is measured: "reap" (how much it adds to its tokens) or "frequency" (how
            many tokens reach it).
        samples: windows of text that each client calibrates on.
        length: tokens in a window.
    """

    kind: Literal["structured"]
    channels: Sparsity = 0.25
    heads: Sparsity = 0.25
    depth: Sparsity = 0.0
    contiguous: bool = False
    protect_ends: bool = True
    repair: bool = True
    score: Annotated[str, method_of(PACKAGE)] = "diagonal_fisher"
    experts: Sparsity = 0.0
    expert_score: Annotated[str, method_of(expert_scores.PACKAGE)] = "reap"
    samples: Samples = 16
    length: Length = 512

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_named(cls, keys: Any) -> Any:
        names_others = isinstance(keys, dict) and (keys.get("depth") or keys.get("experts"))
        return {"channels": 0.0, "heads": 0.0, **keys} if names_others else keys

    @model_validator(mode="after")
    def _cuts_something(self) -> Self:
        if self.channels == self.heads == self.depth == self.experts == 0:
            raise ValueError("channels, heads, depth and experts are all 0, so nothing is cut; raise one")
        needs = {"contiguous": "depth", "protect_ends": "depth", "expert_score": "experts"}
        if not self.narrows:
            needs["score"] = "channels or heads"
        self.refuse_without({key: cut for key, cut in needs.items() if not getattr(self, cut, 0)})
        if self.experts and (self.narrows or self.depth):
            raise ValueError("experts: they are not cut together with channels, heads or depth; set these to 0")
        return self

    @property
    def narrows(self) -> bool:
        """Whether blocks become narrower."""
        return bool(self.channels or self.heads)

    @property
    def repairs(self) -> bool:
        """Whether linears are repaired."""
        return self.repair and self.narrows

    def calibration_windows(self) -> tuple[int, int] | None:
        return self.samples, self.length

    def methods(self) -> set[str]:
        return {self.expert_score if self.experts else self.score}

    def cuts(self) -> Cut:
        return Cut(self.channels, self.heads, self.depth, self.experts)

    def hidden_states_kept(self, num_blocks: int) -> int:
        return num_blocks + 2 if self.narrows else Cut.whole(self.depth, num_blocks) + 2

    def check(self, job: Job, index: int) -> None:
        if index > 0:
            raise ValueError(
                f'stages.{index}.kind: "{self.kind}" needs the model that the clients have; make it the first stage'
            )

    def centralized(self, job: Job) -> Self:
        return self.model_copy(update={"samples": sum(client.samples or self.samples for client in job.clients)})
