"""LLM-Pruner's first-order Taylor score, vector-wise (Ma et al., NeurIPS 2023): |Σ w·∂L/∂w| over a group.

From the paper: the absolute value of the sum, over the linear that reads the group only (its aggregation "last-only"). The
element-wise form Σ |w·∂L/∂w| is not offered: absolute values of the clients' gradients do not add up to that of the pooled
text, and it needs the gradient of every weight. The sum over all coupled linears is not offered either: it consists of the same
products again.

Do not trust it with much text: near an optimum the mean gradient approaches zero, and what remains of the sum is noise.
"""

from __future__ import annotations

from torch import Tensor

SIGNED = True
PER_WEIGHT = False


def weigh(products: Tensor) -> Tensor:
    """What each window adds to the sum: (windows, groups) -> (windows, groups)."""
    return products


def finish(total: Tensor) -> Tensor:
    """The size of the change from cutting a group, regardless of its sign."""
    return total.abs()
