"""Sum of squared first-order changes: the diagonal of the Fisher information of a mask over the groups.

This is the score of Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (NeurIPS 2022), and the group form
of Molchanov et al. (CVPR 2019). Unlike in ``taylor``, windows whose loss would rise and windows whose loss would fall do not
cancel.
"""

from __future__ import annotations

from torch import Tensor

SIGNED = False
PER_WEIGHT = False


def weigh(products: Tensor) -> Tensor:
    """What each window adds to the sum: (windows, groups) -> (windows, groups)."""
    return products.square()


def finish(total: Tensor) -> Tensor:
    """The sum itself: the mean over windows up to a factor that all groups share."""
    return total
