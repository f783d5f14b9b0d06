"""Squares of the first-order changes: the diagonal of the Fisher information of a mask over the groups.

The score of Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (NeurIPS 2022), and the group form of
Molchanov et al. (CVPR 2019). A window that would be hurt and one that would be helped do not cancel, as they do in ``taylor``.
"""

from __future__ import annotations

from torch import Tensor

SIGNED = False


def weigh(products: Tensor) -> Tensor:
    """What each window adds: (windows, groups) -> (windows, groups)."""
    return products.square()


def finish(total: Tensor) -> Tensor:
    """The mean over windows but for a factor that all groups share."""
    return total
