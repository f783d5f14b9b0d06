"""From sums to a head, and what is too little for one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgrove.errors import FedgroveError
from fedgrove.rounds.aggregator.moments import Moments
from fedgrove.stages.head.heads import Linear, head_of


class TooFew(FedgroveError):
    """The records are too few for a head."""


def solve(moments: Moments, head: str, ridge: float, labels: Sequence[str]) -> tuple[Linear, Tensor]:
    """The head, and the indices of its classes: the labels that have records.

    Args:
        moments: for all labels.
        head: its name.
        ridge: see :class:`fedgrove.stages.head.config.Config`.
        labels: the labels' names, for errors.

    Raises:
        TooFew: all records have one label, or they are too few for this head; says how many.
        FedgroveError: the equations have no solution.
    """
    method, classes = head_of(head), moments.counts.nonzero().squeeze(1)
    if len(classes) < 2:
        only = f"all {moments.records:,} records have the label {labels[int(classes[0])]!r}" if len(classes) else "no records"
        raise TooFew(f"head: {only}, but a head needs records of two", "add records, or fix the key answer")
    features = len(moments.squares)
    needed = method.records_needed(len(classes), features)
    if moments.records < needed:
        raise TooFew(
            f'head: {moments.records:,} records, but "{head}" of {len(classes)} labels on {features} features needs {needed:,}',
            "lower size, add records, or take another head",
        )
    try:
        linear = method.solve(moments.present(), ridge)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch exports it in docs
        raise FedgroveError(f'head: the equations of "{head}" have no solution', "raise ridge") from error
    return linear, classes
