"""What a model costs to hold and to train: counted, and for activations measured on a block without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder, linears
from fedgrove.models.experts import expert_of


@dataclass(frozen=True)
class ModelCost:
    """A model as far as it costs something; counted, but for ``saved``.

    Attributes:
        linears: (out, in) of each linear that can be tuned.
        others: numbers in all other weights.
        width: of the hidden states; vocabulary: number of logits.
        num_blocks: decoder blocks.
        saved: numbers that a block without adapters keeps for its backward pass, for one window; measured.
        length: tokens of a window.
        masked: the linears are pruned, so that the products of the factors are formed and masked.
    """

    linears: Mapping[str, tuple[int, int]]
    others: int
    width: int
    vocabulary: int
    num_blocks: int
    saved: int
    length: int
    masked: bool = False

    @property
    def parameters(self) -> int:
        """Numbers in all linears."""
        return sum(rows * columns for rows, columns in self.linears.values())


def measure_cost(decoder: Decoder, length: int, masked: bool) -> ModelCost:
    """Counts a model, and what one of its blocks keeps for the backward pass of a window.

    Raises:
        FedgroveError: it has experts.
    """
    if any(map(expert_of, decoder.linear_names())):
        raise FedgroveError(
            f"model: a mixture of experts ({decoder.checkpoint.config.model_type}) can be pruned, not tuned: plain peft has no "
            "adapters for its experts",
            "leave the stage tune out",
        )
    shapes = {name: tuple(decoder.read_shape(name)) for name in decoder.linear_names()}
    config = decoder.checkpoint.config.get_text_config()
    hidden, calls = decoder.embed(torch.zeros(1, length, dtype=torch.int64))
    saved: dict[int, int] = {}  # storage -> its numbers; weights, which are saved too, are there anyway

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with decoder.hollow(0) as block, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        block(hidden.clone().requires_grad_(), *calls[0][0], **calls[0][1])
    in_linears = sum(cast(torch.Tensor, m.weight).numel() for m in linears(decoder.blocks[0]).values())
    everything = sum(parameter.numel() for parameter in decoder.model.parameters())
    return ModelCost(
        linears={name: (shape[0], shape[1]) for name, shape in shapes.items()},
        others=everything - len(decoder) * in_linears,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        num_blocks=len(decoder),
        saved=sum(saved.values()),
        length=length,
        masked=masked,
    )
