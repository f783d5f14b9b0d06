"""Mixture-of-experts blocks with every expert's matrices as linears of their own, so that each has statistics of its own.

The transformers library keeps all experts of a block in two parameters of three dimensions, where most checkpoints hold a
tensor for each matrix. Here the first are replaced by the second, and a checkpoint that holds the first is read as if it held
the second (see :func:`slices`). Routers stay what they are: no linear, and never pruned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedgrove.errors import FedgroveError

# where an expert is down(act(gate(x)) · up(x)) without biases and the router no nn.Linear; tested by running, one by one
TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe")
FUSED = ("gate_up_proj", "down_proj")  # (experts, 2·ff, width), the gate's rows first, and (experts, width, ff)


class Expert(nn.Module):
    """One expert: a gated feed-forward part."""

    def __init__(self, width: int, channels: int, act: Any):
        super().__init__()
        self.gate_proj = nn.Linear(width, channels, bias=False, device="meta")
        self.up_proj = nn.Linear(width, channels, bias=False, device="meta")
        self.down_proj = nn.Linear(channels, width, bias=False, device="meta")
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        """x is (tokens, width), as is the result."""
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Experts(nn.Module):
    """What transformers' fused experts compute; children ``0``, ``1``, … are the experts, on the meta device at first.

    Args:
        fused: the module that it stands in for.
    """

    def __init__(self, fused: nn.Module):
        super().__init__()
        number, width, channels = cast(Tensor, fused.down_proj).shape
        for index in range(number):  # no ModuleList: those are where blocks are looked for
            self.add_module(str(index), Expert(width, channels, fused.act_fn))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Every token's sum of its experts' results. An expert that got no token is called with none: it has been reached.

        Args:
            hidden: (tokens, width).
            chosen: (tokens, k) indices of experts.
            weights: (tokens, k).
        """
        result = torch.zeros_like(hidden)
        for index, expert in enumerate(self.children()):
            token, place = torch.where(chosen == index)
            out = expert(hidden[token]) * weights[token, place, None]
            result.index_add_(0, token, out.to(result.dtype))
        return result


def unfuse(model: nn.Module, kind: str) -> None:
    """Replaces all fused experts of a model without weights.

    Args:
        model: of the transformers library.
        kind: its ``model_type``.

    Raises:
        FedgroveError: there are some, and how they compute is not known here.
    """
    for name, module in list(model.named_modules()):
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            if kind not in TYPES:
                raise FedgroveError(
                    f"model: {type(model).__name__} has weights of three dimensions that fedgrove does not know (experts, "
                    f"convolutions); of mixtures of experts it prunes {', '.join(TYPES)}"
                )
            model.set_submodule(name, Experts(module))


def expert_of(linear: str) -> str | None:
    """The expert that a linear belongs to, by name; None where all tokens reach it."""
    match = re.match(r"(.*\.experts\.\d+)\.", linear)
    return match[1] if match else None


def old_name(name: str) -> str:
    """A parameter's name in the checkpoints of Mixtral, which call the same things otherwise."""
    for now, then in ((".mlp.", ".block_sparse_moe."), (".gate_proj.", ".w1."), (".down_proj.", ".w2."), (".up_proj.", ".w3.")):
        name = name.replace(now, then)
    return name


def slices(name: str, shape: Sequence[int]) -> dict[str, tuple[int, slice]]:
    """The matrices in a tensor of a checkpoint that holds fused experts: each one's name -> its expert and its rows.

    Args:
        name: of the tensor; for any but fused experts there are none.
        shape: of the tensor.
    """
    owner, _, leaf = name.rpartition(".")
    if len(shape) != 3 or not owner.endswith(".experts") or leaf not in FUSED:
        return {}
    half = shape[1] // 2
    rows = {"gate_proj": slice(0, half), "up_proj": slice(half, shape[1])} if leaf == FUSED[0] else {leaf: slice(0, shape[1])}
    return {f"{owner}.{index}.{part}.weight": (index, span) for index in range(shape[0]) for part, span in rows.items()}
