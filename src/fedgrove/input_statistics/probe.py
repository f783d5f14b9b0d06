"""Which inputs the blocks of a model have and how large they are, measured by the server on random tokens, not on any text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgrove.input_statistics.fixed_point import scale_of
from fedgrove.input_statistics.shared_inputs import shared_inputs
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.blocks import Decoder
from fedgrove.models.experts import expert_of

PROBE = 512  # the largest number of random tokens on which the size of the model's inputs is measured
CLIP_FACTOR = 1.5  # with noise, a window's Σ x² is clipped at this many times the norm that random tokens have


@dataclass(frozen=True)
class SharedInput:
    """An input that one or several linears of a block read.

    Attributes:
        consumers: the linears that read it; the input is named after the first.
        scale: (in,) powers of two by which clients multiply, see :func:`fedgrove.input_statistics.fixed_point.scale_of`.
        norm: for differential privacy, the L2 norm to which a window's scaled Σ x² is clipped.
    """

    consumers: list[str]
    scale: Tensor
    norm: float


def probe(decoder: Decoder, length: int, seed: int) -> list[dict[str, SharedInput]]:
    """Finds the inputs of every block and measures how large they are, in one pass over random tokens; no text is used.

    Args:
        decoder: the model at the start of the stage.
        length: tokens of a window of text.
        seed: draws the random tokens.

    Returns:
        For each block, its inputs by name.
    """
    vocabulary = decoder.checkpoint.config.get_text_config().vocab_size
    number = min(length, PROBE)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (1, number), generator=generator)
    hidden, calls = decoder.embed(ids)
    blocks = []
    for index in range(len(decoder)):
        with decoder.loaded(index) as block, shared_inputs(block, lambda name: InputStatistics("squares")) as inputs:
            hidden = decoder.run(block, hidden, calls[index])
        consumers: dict[int, list[str]] = {}
        for name, shared in inputs.items():
            consumers.setdefault(id(shared), []).append(name)
        inputs_of_block = {}
        for names in consumers.values():
            seen = _seen(names[0], inputs)
            scale = scale_of(seen).cpu()
            norm = CLIP_FACTOR * length / number * float((seen.squares.cpu() * scale.square()).norm())
            inputs_of_block[names[0]] = SharedInput(names, scale, norm)
        blocks.append(inputs_of_block)
    return blocks


def _seen(first: str, inputs: Mapping[str, InputStatistics]) -> InputStatistics:
    """An input's statistics on random tokens; if none reached this expert, those of the same linear in another expert."""
    if inputs[first].silent and expert_of(first):
        leaf = first.rpartition(".")[2]
        alike = (sums for name, sums in inputs.items() if expert_of(name) and name.rpartition(".")[2] == leaf)
        return next((sums for sums in alike if not sums.silent), inputs[first])
    return inputs[first]
