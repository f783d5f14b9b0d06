"""Pruning with sums over text, on whichever machine has them: the server with those of all, a client with a mix for itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedgrove.input_statistics import fixed_point
from fedgrove.input_statistics.statistics import InputStatistics
from fedgrove.models.blocks import Decoder
from fedgrove.models.masks import Target
from fedgrove.stages.prune import pruners
from fedgrove.stages.prune.pruners import Damping
from fedgrove.stages.prune.shared import complete_names


def statistics_of(
    sums: Mapping[str, Tensor], first: str, scale: Tensor, tokens: float, device: torch.device | str, moments: bool = False
) -> InputStatistics:
    """The statistics of one input for a pruner, from the sums of a block, on the device where it prunes.

    Args:
        sums: ``<input>/squares`` and, as far as they were summed, ``/products``, ``/sums`` and ``/spreads``: see
            :class:`~fedgrove.input_statistics.fixed_point.Statistic`.
        first: the input, named after the first linear that reads it.
        scale: (in,), by which the input was multiplied.
        tokens: in the sums.
        moments: means and variances; else the products, or the squares where no products were summed.
    """
    at = {name.removeprefix(f"{first}/"): total.to(device) for name, total in sums.items() if name.startswith(f"{first}/")}
    of_moments = (at["sums"], at["spreads"]) if moments else None
    return fixed_point.finish(at["squares"], at.get("products"), scale.to(device), tokens, of_moments)


def prune_linear(
    decoder: Decoder, block: int, name: str, known: InputStatistics, pruner: str, target: Target, damping: Damping
) -> tuple[Tensor, Tensor]:
    """Prunes a linear of a block.

    Args:
        known: the statistics of its input; with squares alone, where the pruner needs products, it is pruned by Wanda.
        pruner, target, damping: see :func:`~fedgrove.stages.prune.pruners.prune`.

    Returns:
        The weight in the checkpoint's dtype, and its mask; (out, in) each, on the CPU.

    Raises:
        ValueError: the statistics hold NaN or infinity, or the Gram matrix cannot be factored.
    """
    if known.kind == "squares" and pruners.pruner_of(pruner).NEEDS == "gram":  # with mixed = true
        pruner = "wanda"
    before = decoder.read_linear(block, name)
    weight = before.to(decoder.device, torch.float32, copy=True).contiguous()
    weight, mask = pruners.prune(pruner, weight, known, target, damping)
    return weight.to(before.dtype).cpu(), mask.cpu()


def prune_by_magnitude(decoder: Decoder, block: int, target: Target) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Prunes a block by magnitude, which needs no statistics; yields each linear as :func:`prune_linear` returns it."""
    nothing = InputStatistics("nothing")
    for name in complete_names(decoder, block):
        yield name, *prune_linear(decoder, block, name, nothing, "magnitude", target, "mean")
