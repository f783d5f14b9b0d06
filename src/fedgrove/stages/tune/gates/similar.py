"""A key for each member, and each owner as a whole goes to the nearest: owners whose texts are alike train one member.

From *User-Centric Federated Learning* (Mestoukirdi et al., arXiv 2110.09869): owners are put into streams by how alike they
are, fixed before training. From *Crayon* (Bang et al., ACL 2024): a newcomer's weights come from how alike its text is to the
members'. Ours: alike are the mean directions of the windows' features in the frozen model, not gradients; streams are spherical
k-means of owners, one point each, by the exact sums of :mod:`fedgrove.stages.tune.gates.keys`; an owner belongs to one stream.

Do not use it where each owner has text of several kinds: its mean is then near no kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.rounds.request import Tensors
from fedgrove.stages.tune.gates import Looks, keys

LOOKS: Looks = "features"
OF_CLIENTS = True
KEYS = keys.KEYS

begin, specs, is_valid, sums, check = keys.begin, keys.specs, keys.is_valid, keys.sums, keys.check
settle, finish, kept, surprise = keys.settle, keys.finish, keys.kept, keys.surprise


def observe(features: Tensor, state: Tensors) -> Tensors:
    """As :func:`fedgrove.stages.tune.gates.keys.observe` of one point, the owner."""
    return keys.observe(_mean_direction(features), state)


def weights(features: Tensor, state: Tensors) -> Tensor:
    """1 for the owner's nearest key, in every row."""
    return keys.weights(_mean_direction(features), state).expand(len(features), -1).contiguous()


def _mean_direction(features: Tensor) -> Tensor:
    """(windows, size) -> (1, size)."""
    return torch.nn.functional.normalize(features, dim=1).mean(0, keepdim=True)
