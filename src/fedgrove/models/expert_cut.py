"""A model without some of its experts: how its router chooses, the names of its tensors, and its config.json.

Every block that has experts keeps the same number. Those that stay are numbered anew, and their rows of the router and of its
correction bias stay with them, so any program that loads the architecture loads the result. Shared experts stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.job.stage_config import Cut
from fedgrove.job.units import MAX_BLOCKS, Index
from fedgrove.models.depth import FURTHER_BLOCKS, ascending, parts_of
from fedgrove.models.masks import lowest

if TYPE_CHECKING:  # whoever reads a job need not wait for transformers
    from transformers import PretrainedConfig

MAX_EXPERTS = 2**16  # of a block
KeptExperts = Mapping[int, tuple[int, ...]]  # of each block that has experts, the indexes of those that stay, ascending
_Numbers = Annotated[tuple[Annotated[Index, Field(lt=MAX_EXPERTS)], ...], Field(min_length=1, max_length=MAX_EXPERTS)]
_OfBlock = tuple[Annotated[Index, Field(lt=MAX_BLOCKS)], Annotated[_Numbers, AfterValidator(ascending)]]


def _blocks_ascend(sent: tuple[_OfBlock, ...]) -> tuple[_OfBlock, ...]:
    ascending(tuple(block for block, _ in sent))
    return sent


SentExperts = Annotated[
    tuple[_OfBlock, ...], Field(min_length=1, max_length=MAX_BLOCKS), AfterValidator(_blocks_ascend)
]  # the same as a field of a message, by block

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # the names of one number in config.json
_OF_EXPERT = re.compile(r"(\.(?:mlp|block_sparse_moe)\.experts\.)(\d+)(\..+)")
_ROW_PER_EXPERT = re.compile(
    r"\.(?:mlp|block_sparse_moe)\.(?:gate\.(?:weight|e_score_correction_bias)|experts\.(?:gate_up_proj|down_proj))"
)
_BEST_OF_GROUP = {"deepseek_v3": 2, "glm4_moe": 2}  # a group's score is the sum of its best experts' scores; else 1


@dataclass(frozen=True)
class Routing:
    """How the router of a block chooses a token's experts.

    Attributes:
        experts: the number of experts.
        per_token: how many of them compute a token.
        groups: into how many groups of consecutive experts they are divided; 1: none.
        groups_per_token: from how many groups a token's experts are chosen.
        best_of_group: by how many of its experts a group is chosen.
    """

    experts: int
    per_token: int
    groups: int = 1
    groups_per_token: int = 1
    best_of_group: int = 1

    @property
    def fewest(self) -> int:
        """The smallest number of experts with which the router can still choose as it does."""
        in_group = max(self.best_of_group, -(-self.per_token // self.groups_per_token))
        return in_group * self.groups

    def left(self, fraction: float) -> int:
        """The number of experts after a cut; all groups lose the same number, the fraction rounded down."""
        return self.experts - self.groups * Cut.whole(fraction, self.experts // self.groups)

    @property
    def numbers(self) -> list[int]:
        """The numbers of experts that a smaller model can have, ascending, with that of the whole one."""
        return list(range(self.fewest, self.experts + 1, self.groups))


def routing_of(config: PretrainedConfig) -> Routing:
    """How the routers of a model choose.

    Raises:
        FedgroveError: its configuration has no number of experts.
    """
    name = next((name for name in _COUNTS if getattr(config, name, None)), None)
    if name is None:
        raise FedgroveError(
            f"experts: a configuration of type {config.model_type} has no number of experts", "cut channels, heads or depth"
        )
    limited = getattr(config, "topk_method", None) != "greedy"  # DeepSeek-V2 without a limit on groups
    groups = (getattr(config, "n_group", None) or 1) if limited else 1
    return Routing(
        experts=getattr(config, name),
        per_token=config.num_experts_per_tok,
        groups=groups,
        groups_per_token=(getattr(config, "topk_group", None) or groups) if groups > 1 else 1,
        best_of_group=_BEST_OF_GROUP.get(config.model_type, 1),
    )


def highest_experts(scores: Tensor, number: int, groups: int) -> tuple[int, ...]:
    """The indices of the experts that stay, ascending: those of the highest scores, as many of every group.

    Args:
        scores: (experts,); groups are consecutive experts.
        number: how many stay in all groups together.
        groups: the number of groups.
    """
    in_group = len(scores) // groups
    gone = [lowest([group], in_group - number // groups) for group in scores.view(groups, -1)]
    return tuple((~torch.cat(gone)).nonzero().flatten().tolist())


def check_kept(kept: KeptExperts, names: Iterable[str], routing: Routing, number: int, num_blocks: int) -> str | None:
    """Whether experts can be all that a cut leaves of a model; returns what is wrong, or None.

    Args:
        names: of the whole model's tensors.
        routing: of the whole model.
        number: of experts that the cut leaves in every block that has any.
    """
    places = (parts_of(name) for name in names if ".experts." in name)
    if kept.keys() != {parts[1] for parts in places if parts is not None and parts[1] < num_blocks}:
        return "other blocks than those that have experts"
    in_group, left = routing.experts // routing.groups, number // routing.groups
    for experts in kept.values():
        groups = [expert // in_group for expert in experts]
        if experts[-1] >= routing.experts or any(groups.count(group) != left for group in range(routing.groups)):
            return "other numbers of experts than the job leaves"
    return None


def has_row_per_expert(name: str) -> bool:
    """Whether a tensor of a checkpoint has one row for each expert of its block."""
    parts = parts_of(name)
    return parts is not None and _ROW_PER_EXPERT.fullmatch(parts[2]) is not None


class Source(NamedTuple):
    """Where a tensor of the smaller model comes from.

    Attributes:
        name: of the tensor in the full model.
        rows: the indexes of its first dimension that stay; None: all.
    """

    name: str
    rows: tuple[int, ...] | None


def kept_tensors(names: Iterable[str], kept: KeptExperts, num_blocks: int) -> dict[str, Source]:
    """The tensors of a model without some experts, by their new names, in the same order.

    Blocks after the last one (for the prediction of several tokens) are left out: no text passes through their experts, but
    config.json gives all blocks the same number.

    Args:
        names: of the full model's tensors, in the form of the checkpoint: single or fused experts.
        kept: see :data:`KeptExperts`.
        num_blocks: the number of the model's blocks.
    """
    new = {}
    for name in names:
        before, block, after = parts_of(name) or ("", -1, name)
        if block >= num_blocks:
            continue
        if block not in kept:
            new[name] = Source(name, None)
            continue
        expert = _OF_EXPERT.fullmatch(after)
        if expert is None:
            new[name] = Source(name, kept[block] if _ROW_PER_EXPERT.fullmatch(after) else None)
        elif int(expert[2]) in kept[block]:
            place = kept[block].index(int(expert[2]))
            new[f"{before}{block}{expert[1]}{place}{expert[3]}"] = Source(name, None)
    return new


def fewer_experts_config(raw: Mapping[str, Any], config: PretrainedConfig, number: int) -> dict[str, Any]:
    """The config.json of a model with fewer experts in each block that has any.

    Args:
        raw: the current config.json.
        config: the same as parsed by transformers, with defaults filled in.
        number: of experts that stay.

    Raises:
        FedgroveError: the configuration has no number of experts.
    """
    routing_of(config)
    new = _with(raw, config, _COUNTS, number)
    return _with(new, config, FURTHER_BLOCKS, 0) if any(hasattr(config, name) for name in FURTHER_BLOCKS) else new


def _with(raw: Mapping[str, Any], config: PretrainedConfig, names: Sequence[str], value: int) -> dict[str, Any]:
    """A config.json with another value under those of the names that it uses, or under the name that its type uses."""
    used = [name for name in names if name in raw]
    own = next(name for name in names if hasattr(config, name))
    return {**raw, **dict.fromkeys(used or [config.attribute_map.get(own, own)], value)}
