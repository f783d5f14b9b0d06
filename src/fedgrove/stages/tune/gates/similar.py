"""A key for each member, and each owner as a whole goes to the nearest: owners whose texts are alike train one member.

From *User-Centric Federated Learning* (Mestoukirdi et al., arXiv 2110.09869): owners are put into streams by how alike they
are, fixed before training. From *Crayon* (Bang et al., ACL 2024): a newcomer's weights come from how alike its text is to the
members'. Ours: alike are directions of the owners' text in the frozen model, not gradients, each relative to the mean of all
owners; streams are spherical k-means of owners, one point each, by the exact sums of :mod:`fedgrove.stages.tune.gates.keys`; an
owner belongs to one stream. All that is learnt of an owner is one direction, which needs noise only once: so this gate can be
used with differential privacy.

The paper takes the number of streams with the best silhouette, which is never one. With ``members = "auto"`` keys are fitted to
one half of each owner's text and judged by the other half, which also says when there is one kind of owner only.

Do not use it where each owner has text of several kinds: its direction is then near no kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgrove.rounds.request import Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.gates import Looks, keys

if TYPE_CHECKING:
    from fedgrove.stages.tune.pool.config import Pool

LOOKS: Looks = "features"
OF_CLIENTS = True
CHOOSES = True
SAYS = keys.SAYS
KEYS = keys.KEYS - {"directions"}

TELLS = 0.5  # the least mean cosine of a half and the key of the other half; of owners who are all alike, it is near 0
NEAR = 0.05  # fewer members are taken if they are not farther from the best

specs, is_valid, kept, surprise = keys.specs, keys.is_valid, keys.kept, keys.surprise


def begin(pool: Pool, size: int, seed: str) -> Tensors:
    """As of ``keys``; with "auto" starts of one member, of two, and so on, side by side."""
    state = keys.begin(pool, size, seed)["keys"]
    numbers = [pool.most] if isinstance(pool.members, int) else range(1, pool.most + 1)
    there = torch.arange(pool.most)[:, None]
    return {"keys": torch.cat([torch.where(there < number, state, 0.0) for number in numbers])}


def observe(features: Tensor, state: Tensors) -> Tensors:
    """As of ``keys``, of one point, the owner; and ``judged``, the cosine of one half of it and the other half's key.

    Args:
        features: (1, size), or (3, size) with the directions of both halves after that of all: the first half is the point.
    """
    if len(features) == 1:
        found = keys.observe(features, state)
        return found | {"judged": torch.zeros_like(found["cosines"])}
    chosen = keys.cosines_of(features[1:2], state)[0].argmax(1, keepdim=True)
    judged = keys.cosines_of(features[2:3], state)[0].gather(1, chosen)[:, 0, 0]
    return keys.observe(features[1:2], state) | {"judged": (judged * 2.0**keys.BITS).round().long()}


def sums(members: int, starts: int, size: int) -> TensorSpecs:
    """As of ``keys``, and ``judged`` (starts,) int64."""
    found = keys.sums(members, starts, size)
    return {**found, "judged": found["cosines"]}


def check(sums: Tensors, windows: int) -> None:
    """As of ``keys``."""
    keys.check(sums, windows)
    if bool((sums["judged"].double().abs() > sums["counts"].double().sum(1) * (2**keys.BITS + 1)).any()):
        raise WireError("its cosines are out of range")


def settle(state: Tensors, sums: Tensors) -> tuple[Tensors, float]:
    """One step of k-means; the second value is the mean cosine of an owner to its key, over all starts: each may be the one."""
    return keys.settle(state, sums)[0], float(keys.means(sums["cosines"], sums).mean())


def finish(state: Tensors, sums: Tensors, fewest: int) -> Tensors:
    """The best start's keys that enough clients hold; the fewest of those that say as much of the other half as any."""
    fitted, judged = (keys.means(sums[name], sums) for name in ("cosines", "judged"))
    numbers = keys.used(state).sum(1)
    best = {}
    for number in sorted(set(numbers.tolist())):
        best[number] = int(torch.where(numbers == number, fitted, -torch.inf).argmax())
    if len(best) > 1:
        value = {number: float(judged[start]) if number > 1 else 0.0 for number, start in best.items()}
        most = max(value.values())
        enough = most - NEAR if most > TELLS else -1.0
        best = {number: start for number, start in best.items() if value[number] >= enough}
    return keys.held(state, sums, fewest, next(iter(best.values())))


def weights(features: Tensor, state: Tensors) -> Tensor:
    """1 for the nearest key of an owner: (1, size), or more rows after the first, -> (1, members)."""
    return keys.weights(features[:1], state)
