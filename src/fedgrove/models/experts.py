"""Mixture-of-experts blocks with each expert's matrices as separate linears, so that each has its own input statistics.

The transformers library stores all experts of a block in two parameters of three dimensions (fused), while most checkpoints
hold one tensor per matrix. Here fused experts are replaced by separate linears, and a checkpoint with fused experts is read as
if it held separate matrices (see :func:`slices`). Routers are unchanged: they are no linears, and never pruned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedgrove.errors import FedgroveError

# Their experts are down(act(gate(x)) · up(x)) without biases, and their router is no nn.Linear; each was tested by running it.
TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe")
FUSED = ("gate_up_proj", "down_proj")  # (experts, 2·ff, width), the gate's rows first; (experts, width, ff)


class Expert(nn.Module):
    """One expert: a gated feed-forward network."""

    def __init__(self, width: int, channels: int, act: Any):
        super().__init__()
        self.gate_proj = nn.Linear(width, channels, bias=False, device="meta")
        self.up_proj = nn.Linear(width, channels, bias=False, device="meta")
        self.down_proj = nn.Linear(channels, width, bias=False, device="meta")
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, width)."""
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Experts(nn.Module):
    """Computes the same as transformers' fused experts; its children ``0``, ``1``, … are the experts, on the meta device.

    Args:
        fused: the module that it replaces.
    """

    def __init__(self, fused: nn.Module):
        super().__init__()
        number, width, channels = cast(Tensor, fused.down_proj).shape
        for index in range(number):  # not a ModuleList: find_blocks would take it for the blocks
            self.add_module(str(index), Expert(width, channels, fused.act_fn))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts. Experts without tokens are called too, so that their hooks run.

        Args:
            hidden: (tokens, width).
            chosen: (tokens, k) indices of experts.
            weights: (tokens, k).

        Returns:
            (tokens, width).
        """
        result = torch.zeros_like(hidden)
        for index, expert in enumerate(self.children()):
            token, place = torch.where(chosen == index)
            out = expert(hidden[token]) * weights[token, place, None]
            result.index_add_(0, token, out.to(result.dtype))
        return result


def unfuse(model: nn.Module, kind: str) -> None:
    """Replaces all fused experts of a model, in place.

    Args:
        model: of the transformers library, without weights.
        kind: its ``model_type``.

    Raises:
        FedgroveError: it has fused experts of an unknown type.
    """
    for name, module in list(model.named_modules()):
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            if kind not in TYPES:
                raise FedgroveError(
                    f"model: {type(model).__name__} has weights of three dimensions that fedgrove does not know (experts, "
                    f"convolutions); of mixtures of experts it prunes {', '.join(TYPES)}"
                )
            model.set_submodule(name, Experts(module))


def experts_in(block: nn.Module) -> Experts | None:
    """The experts of a block; None if it has none."""
    return next((module for module in block.modules() if isinstance(module, Experts)), None)


def expert_of(linear: str) -> str | None:
    """The name of the expert that a linear belongs to; None if it belongs to none, so that all tokens reach it."""
    match = re.match(r"(.*\.experts\.\d+)\.", linear)
    return match[1] if match else None


def expert_place(linear: str) -> tuple[int, int] | None:
    """The index of the block and the number of the expert that a linear belongs to; None if it belongs to no expert."""
    match = re.match(r"(?:[^.]+\.)*?(\d+)\.(?:[^.]+\.)*?experts\.(\d+)\.", linear)
    return (int(match[1]), int(match[2])) if match else None


def legacy_name(name: str) -> str:
    """A parameter's name in the checkpoints of Mixtral, which use older names."""
    for current, legacy in (
        (".mlp.", ".block_sparse_moe."),
        (".gate_proj.", ".w1."),
        (".down_proj.", ".w2."),
        (".up_proj.", ".w3."),
    ):
        name = name.replace(current, legacy)
    return name


def slices(name: str, shape: Sequence[int]) -> dict[str, tuple[int, slice]]:
    """The matrices in a checkpoint's tensor of fused experts: the name of each -> its expert's index and its rows.

    Args:
        name: of the tensor; the result is empty if it holds no fused experts.
        shape: of the tensor.
    """
    owner, _, leaf = name.rpartition(".")
    if len(shape) != 3 or not owner.endswith(".experts") or leaf not in FUSED:
        return {}
    half = shape[1] // 2
    rows = {"gate_proj": slice(0, half), "up_proj": slice(half, shape[1])} if leaf == FUSED[0] else {leaf: slice(0, shape[1])}
    return {f"{owner}.{index}.{part}.weight": (index, span) for index in range(shape[0]) for part, span in rows.items()}
