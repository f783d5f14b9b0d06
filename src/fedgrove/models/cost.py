"""What a model costs in memory and computation: counted, and for activations measured on a block with zero weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgrove.models.expert_cut import Routing, has_row_per_expert, routing_of
from fedgrove.models.experts import expert_of, expert_place, experts_in

if TYPE_CHECKING:  # whoever reads a job need not wait for transformers
    from fedgrove.models.blocks import Decoder
    from fedgrove.models.replaced_blocks import Call

FEW = 32  # tokens that bfloat16 activations are measured on: some processors take seven times as long for them
LOGITS_AT_ONCE = 2**25  # with what their loss needs besides, half a gigabyte in float32


@dataclass(frozen=True)
class Experts:
    """The experts of a model of which a client may hold only some.

    Attributes:
        routing: how the routers choose.
        blocks: the indexes of the blocks that have experts.
        per_expert: entries of a router for each expert of a block.
    """

    routing: Routing
    blocks: tuple[int, ...]
    per_expert: int


@dataclass(frozen=True)
class ModelCost:
    """The sizes of a model that determine its cost.

    Attributes:
        linears: (out, in) of each linear that can be tuned.
        others: number of entries of all other weights.
        width: of the hidden states.
        vocabulary: number of logits of a token.
        num_blocks: number of decoder blocks.
        saved: number of activations that a block without adapters saves for the backward pass of one window; measured.
        length: tokens of a window.
        saved_half: bytes of these activations where a block computes in bfloat16; measured, as norms save float32 even then.
        masked: whether the linears are pruned, so that the products of the factors are computed and masked.
        passes: for some linears, how many times a token passes through each: more than once if blocks share it, and for that of
            an expert the average over experts.
        experts: of a mixture of experts; else None.
    """

    linears: Mapping[str, tuple[int, int]]
    others: int
    width: int
    vocabulary: int
    num_blocks: int
    saved: int
    length: int
    saved_half: int
    masked: bool = False
    passes: Mapping[str, float] = field(default_factory=dict)
    experts: Experts | None = None

    @cached_property  # these sums are asked for thousands of times in a plan
    def parameters(self) -> int:
        """Number of entries of all linears."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @cached_property
    def multiplied(self) -> float:
        """Multiplications of all linears for a token: :attr:`parameters`, each as often as a token passes through it."""
        return sum(self.uses(name) * rows * columns for name, (rows, columns) in self.linears.items())

    @cached_property
    def widths(self) -> int:
        """Σ (out + in) over all linears: the numbers of their factors at rank 1."""
        return sum(map(sum, self.linears.values()))

    @cached_property
    def used_widths(self) -> float:
        """The same, each as often as a token passes through the linear."""
        return sum(self.uses(name) * sum(shape) for name, shape in self.linears.items())

    def uses(self, linear: str) -> float:
        """How many times a token passes through a linear."""
        return self.passes.get(linear, 1)

    @property
    def logits(self) -> int:
        """How many are in memory at the same time (:mod:`fedgrove.models.next_tokens`)."""
        return self.vocabulary * tokens_at_once(self.vocabulary, self.length)

    def holding(self, number: int, names: Collection[str] | None = None) -> ModelCost:
        """The same model with ``number`` experts in each block that has any.

        Args:
            names: of the linears that stay; None: those of the first experts, while it is not known which stay.
        """
        if self.experts is None or number == self.experts.routing.experts:
            return self
        if names is None:
            names = {name for name in self.linears if (expert_place(name) or (0, 0))[1] < number}
        gone = (self.experts.routing.experts - number) * len(self.experts.blocks)
        reach = self.experts.routing.per_token / number
        return replace(
            self,
            linears={name: shape for name, shape in self.linears.items() if name in names},
            others=self.others - gone * self.experts.per_expert,
            passes={name: reach if expert_of(name) else uses for name, uses in self.passes.items() if name in names},
        )


def tokens_at_once(vocabulary: int, length: int) -> int:
    """How many tokens have logits at the same time; at most those of a window."""
    return max(1, min(length, LOGITS_AT_ONCE // vocabulary))


def count_parameters(decoder: Decoder) -> int:
    """How many numbers a model has; tied and shared weights count once, whether they are loaded or not."""
    counted = [(name, parameter.numel()) for name, parameter in decoder.model.named_parameters() if name not in decoder.ties]
    if not decoder.checkpoint.shares:
        return sum(numel for _, numel in counted)
    return sum({decoder.stored_name(name): numel for name, numel in counted}.values())


def measure_cost(decoder: Decoder, length: int, masked: bool) -> ModelCost:
    """Counts a model's weights, and measures the activations that one of its blocks saves for a window's backward pass.

    Measured on a CPU wherever the decoder computes, so that a plan does not depend on the server's device; in bfloat16 on few
    tokens. Where only some blocks have experts, one of either kind is measured. Routers are taken to be even.
    """
    shapes = decoder.linear_shapes()
    decoder = decoder.again("cpu")
    config = decoder.checkpoint.config.get_text_config()
    sparse = [index for index, block in enumerate(decoder.blocks) if experts_in(block) is not None]
    saved, half = _saved(decoder, length, sparse), decoder.again("cpu", torch.bfloat16)
    experts, passes = _experts_of(decoder, sparse), dict[str, float]()
    if experts is not None:
        reach = experts.routing.per_token / experts.routing.experts
        passes = {name: reach for name in shapes if expert_of(name)}
    passes |= {decoder.linear_name(*places[0]): len(places) for places in decoder.shared_linears.values()}
    total = count_parameters(decoder)
    return ModelCost(
        linears=shapes,
        others=total - sum(rows * columns for rows, columns in shapes.values()),
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        num_blocks=len(decoder),
        saved=-(-saved // 4),
        length=length,
        saved_half=_saved(half, length, sparse) if length <= FEW else _from_few(half, length, sparse),
        masked=masked,
        passes=passes,
        experts=experts,
    )


def _from_few(decoder: Decoder, length: int, sparse: list[int]) -> int:
    """:func:`_saved` from ``FEW`` tokens and half of them: it grows with the tokens and, in some attentions, their square."""
    once, twice = (_saved(decoder, tokens, sparse) for tokens in (FEW // 2, FEW))
    parts = length / (FEW // 2)
    return math.ceil(parts * once + parts * (parts - 1) / 2 * (twice - 2 * once))


def _saved(decoder: Decoder, length: int, sparse: list[int]) -> int:
    """The bytes that an average block saves for the backward pass of one window, in the decoder's dtype."""
    hidden, calls = decoder.embed(torch.zeros(1, length, dtype=torch.int64))
    dense = [index for index in range(len(decoder)) if index not in sparse]
    total = sum(len(kind) * _saved_by(decoder, kind[0], hidden, calls[kind[0]]) for kind in (sparse, dense) if kind)
    return -(-total // len(decoder))


def _saved_by(decoder: Decoder, index: int, hidden: Tensor, call: Call) -> int:
    """The bytes that a block saves for the backward pass of one window."""
    saved: dict[int, int] = {}  # of each storage; not of weights, which are saved too but take no more memory

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        decoder.zeroed(index, hidden.dtype) as block,
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
    ):
        weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        block(hidden.clone().requires_grad_(), *call[0], **call[1])
    return sum(saved.values())


def _experts_of(decoder: Decoder, blocks: list[int]) -> Experts | None:
    if not blocks:
        return None
    first = decoder.blocks[blocks[0]]
    rows = [tensor for name, tensor in first.state_dict().items() if has_row_per_expert(f"model.layers.0.{name}")]
    routing = routing_of(decoder.checkpoint.config)
    return Experts(routing, tuple(blocks), sum(tensor.numel() for tensor in rows) // routing.experts)
