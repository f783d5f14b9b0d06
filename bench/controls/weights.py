"""The control of bench/structured.py that reads no text: Σ w² over all weights of a group in all its linears."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import fedgrove.stages.structured.exchanges.scores as exchange
from fedgrove.models.blocks import Decoder
from fedgrove.models.width import columns_by_group, family_of, rows_by_group, width_of

SIGNED = False
PER_WEIGHT = True


def weigh(products: Tensor) -> Tensor:
    """Is not called: see ``install``."""
    return products


def finish(total: Tensor) -> Tensor:
    """The sum itself."""
    return total


def install() -> None:
    """Makes clients sum their weights' squares instead of gradients, where this score is asked for."""
    by_gradients = exchange.group_products

    def group_products(decoder: Decoder, ids: Tensor, store: Any, of_weights: Any = None) -> Iterator[Any]:
        here = of_weights is not None and of_weights.__module__.rpartition(".")[2] == "weights"
        yield from by_weights(decoder) if here else by_gradients(decoder, ids, store, of_weights)

    exchange.group_products = group_products


def by_weights(decoder: Decoder) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Σ w² of every group, as if of one window."""
    width, family = width_of(decoder.checkpoint.config), family_of(decoder.checkpoint.config)
    kinds = {"channels": (family.channels, width.channels), "heads": (family.heads, width.heads)}
    for block in range(len(decoder)):
        sums = {}
        for kind, (part, number) in kinds.items():
            if part is None:
                continue
            squares = {name: decoder.read_linear(block, name).double().square() for name in (*part.producers, part.consumer)}
            total = columns_by_group(squares.pop(part.consumer), number).sum(1)
            sums[kind] = (total + sum(rows_by_group(square, number).sum(1) for square in squares.values()))[None]
        yield block, sums
