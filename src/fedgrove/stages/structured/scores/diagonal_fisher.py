"""LLM-Pruner's element-wise second-order score (Ma et al., NeurIPS 2023): Σ (w·∂L/∂w)², over all weights of a group and all
windows.

With the diagonal of the Fisher information in place of the Hessian, half of this is what cutting the group costs near an
optimum, if its weights do not interact. This is the variant ``param_second`` of the published code, whose groups add up the
scores of their weights; the paper's Element² also has the first-order term, which is no sum over windows. From the paper: the
weights of all coupled linears, without their biases. Ours: every window is squared by itself and the sum is exact, so the
clients' sums add up to that of their pooled text; the published code takes ten samples.

Do not trust it where weights of a group work together: it adds up what each weight costs alone, while ``fisher`` measures the
group as a whole.
"""

from __future__ import annotations

from torch import Tensor

SIGNED = False
PER_WEIGHT = True


def weigh(products: Tensor) -> Tensor:
    """What each weight adds to the sum in a window: the result has the shape of ``products``."""
    return products.square()


def finish(total: Tensor) -> Tensor:
    """The sum itself: the mean over windows up to a factor that all groups share."""
    return total
