"""Which channels and heads matter: the two ends of a sum over windows of text. A new aggregation is a new file here.

An aggregation's file holds two functions and a fact. ``products`` are first-order changes of a window's loss, in nats, were a group
cut; see :func:`fedgrove.stages.structured.gradients.group_products`.

    weigh(products) -> what each window adds: (windows, groups) -> (windows, groups)
    finish(total) -> the score of each group from the sum over everybody's windows: the lowest go
    SIGNED: whether what is added may be negative

What is added is a sum over windows, so the clients' sums are the sum of their pooled text, and so is the model. Numbers travel
as whole multiples of 2⁻ᴮᴵᵀˢ: then their sum depends on no order, nor on who holds which window.
"""

from __future__ import annotations

from torch import Tensor

from fedgrove.errors import FedgroveError

BITS = 24  # fractional bits of what one window adds
LARGEST = 2**62  # of a sum over all clients


def fixed_point(values: Tensor, limit: int) -> Tensor:
    """The sum of each column in fixed point.

    Args:
        values: (windows, groups) float64; each window is rounded by itself.
        limit: the largest sum that may be sent.

    Raises:
        FedgroveError: NaN, infinity, or larger than the limit.
    """
    whole = (values * 2.0**BITS).round()
    if not (whole.abs().sum(0) < limit).all():
        raise FedgroveError('the gradients of its text are not finite or too large; try model.dtype = "float32"')
    return whole.long().sum(0)


def floating_point(total: Tensor) -> Tensor:
    """The sum of what :func:`fixed_point` made, float64."""
    return total.double() * 2.0**-BITS
