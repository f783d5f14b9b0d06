"""Everybody's records in two halves, one for every other record: labels in one half are guessed by the head of the other half.

So no record is guessed by a head that was made from guesses about itself, and how often the heads of both halves agree on a
client's records says, without labels, whether guesses help it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.stages.head.heads import Linear

HALVES = 2
FEWEST = 3  # guesses of a label in a half whose sum is sent: one record's features are not to be seen


def half_of(records: int) -> Tensor:
    """(records,) int64: the half that each record of a client belongs to."""
    return torch.arange(records) % HALVES


def named(parts: Sequence[Moments]) -> dict[str, Tensor]:
    """The tensors of sums, by the half and the name; by the name alone if there is one part."""
    if len(parts) == 1:
        return parts[0].tensors()
    return {f"{half}/{name}": tensor for half, part in enumerate(parts) for name, tensor in part.tensors().items()}


def parts_of(tensors: Mapping[str, Tensor]) -> list[Moments]:
    """The sums that :func:`named` gave these names."""
    if "counts" in tensors:
        return [Moments.of(tensors)]
    prefixes = [f"{half}/" for half in range(HALVES)]
    return [
        Moments.of({name.removeprefix(one): tensor for name, tensor in tensors.items() if name.startswith(one)})
        for one in prefixes
    ]


def added(parts: Sequence[Moments]) -> Moments:
    """The sums over the records of all parts."""
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    return total


def guess(head: Linear, classes: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that a head guesses, and for which records it does so most clearly.

    Of each label the clearer half of its records is chosen, not all records beyond one threshold: else labels that are easy to
    guess would take everything. A label that has fewer than ``FEWEST`` of them gets none.

    Args:
        head: of hidden states.
        classes: (classes,) int64: the indices of its labels.
        states: (records, hidden states).

    Returns:
        (records,) int64 indices of labels, and (records,) bool.
    """
    scores = states.double() @ head.weight.T + head.bias
    best = scores.topk(2, 1).values
    clearness, guessed = best[:, 0] - best[:, 1], classes[scores.argmax(1)]
    chosen = torch.zeros(len(states), dtype=torch.bool)
    for label in classes.tolist():
        places = (guessed == label).nonzero().squeeze(1)
        number = -(-len(places) // 2)
        if number >= FEWEST:
            chosen[places[clearness[places].argsort(descending=True, stable=True)[:number]]] = True
    return guessed, chosen
