"""What a model costs in memory and computation: counted, and for activations measured on a block with zero weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fedgrove.errors import FedgroveError
from fedgrove.models.experts import expert_of

if TYPE_CHECKING:  # whoever reads a job need not wait for transformers
    from fedgrove.models.blocks import Decoder


@dataclass(frozen=True)
class ModelCost:
    """The sizes of a model that determine its cost.

    Attributes:
        linears: (out, in) of each linear that can be tuned.
        others: number of entries of all other weights.
        width: of the hidden states.
        vocabulary: number of logits.
        num_blocks: number of decoder blocks.
        saved: number of activations that a block without adapters saves for the backward pass of one window; measured.
        length: tokens of a window.
        masked: whether the linears are pruned, so that the products of the factors are computed and masked.
        shared: for linears that several blocks share, how many times a forward pass comes to each.
    """

    linears: Mapping[str, tuple[int, int]]
    others: int
    width: int
    vocabulary: int
    num_blocks: int
    saved: int
    length: int
    masked: bool = False
    shared: Mapping[str, int] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of entries of all linears."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def multiplied(self) -> int:
        """Multiplications of all linears for a token: :attr:`parameters`, those of shared linears as often as they are used."""
        return sum(self.uses(name) * rows * columns for name, (rows, columns) in self.linears.items())

    def uses(self, linear: str) -> int:
        """How many times a forward pass comes to a linear."""
        return self.shared.get(linear, 1)


def count_parameters(decoder: Decoder) -> int:
    """How many numbers a model has; tied and shared weights count once, whether they are loaded or not."""
    counted = [(name, parameter.numel()) for name, parameter in decoder.model.named_parameters() if name not in decoder.ties]
    if not decoder.checkpoint.shares:
        return sum(numel for _, numel in counted)
    return sum({decoder.stored_name(name): numel for name, numel in counted}.values())


def measure_cost(decoder: Decoder, length: int, masked: bool) -> ModelCost:
    """Counts a model's weights, and measures the activations that one of its blocks saves for a window's backward pass.

    Measured in float32 on a CPU wherever the decoder computes, so that a plan does not depend on the server's device.

    Raises:
        FedgroveError: the model is a mixture of experts.
    """
    if any(map(expert_of, decoder.linear_names())):
        raise FedgroveError(
            f"model: a mixture of experts ({decoder.checkpoint.config.model_type}) can be pruned, not tuned: plain peft has no "
            "adapters for its experts",
            "leave the stage tune out",
        )
    shapes = {name: tuple(decoder.read_shape(name)) for name in decoder.linear_names()}
    decoder = type(decoder)(decoder.checkpoint)  # on the CPU
    config = decoder.checkpoint.config.get_text_config()
    hidden, calls = decoder.embed(torch.zeros(1, length, dtype=torch.int64))
    saved: dict[int, int] = {}  # entries of each storage; not of weights, which are saved too but take no more memory

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with (
        decoder.zeroed(0) as block,
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
    ):
        weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        block(hidden.clone().requires_grad_(), *calls[0][0], **calls[0][1])
    uses = ((decoder.linear_name(*places[0]), len(places)) for places in decoder.shared_linears.values())
    total = count_parameters(decoder)
    return ModelCost(
        linears={name: (shape[0], shape[1]) for name, shape in shapes.items()},
        others=total - sum(rows * columns for rows, columns in shapes.values()),
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        num_blocks=len(decoder),
        saved=sum(saved.values()),
        length=length,
        masked=masked,
        shared=dict(uses),
    )
