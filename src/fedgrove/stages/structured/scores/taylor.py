"""LLM-Pruner's first-order Taylor score, vector-wise (Ma et al., NeurIPS 2023): |Σ w·∂L/∂w| over a group.

The paper's: the absolute value of the sum, of the linear that reads the group alone (its aggregation "last-only"). Its
element-wise form Σ |w·∂L/∂w| is not offered: absolute values of clients' gradients do not add up to those of pooled text,
and it takes the gradient of every weight. Nor is the sum over all coupled linears, which is of the same products again.

Do not trust it where there is much text: near an optimum the mean gradient goes to zero, and what is left of the sum is chance.
"""

from __future__ import annotations

from torch import Tensor

SIGNED = True


def weigh(products: Tensor) -> Tensor:
    """What each window adds: (windows, groups) -> (windows, groups)."""
    return products


def finish(total: Tensor) -> Tensor:
    """The size of the change that cutting a group makes, whichever its direction."""
    return total.abs()
