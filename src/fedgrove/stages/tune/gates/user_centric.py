"""Every owner has a member of its own: the changes of all owners, each weighed by what it is worth to that owner.

From *User-Centric Federated Learning* (Mestoukirdi et al., arXiv 2110.09869): each owner has its own weights of what all owners
train, larger the more alike and the less noisy their gradients are. There the weight of j for i falls with the exponential of
‖gᵢ − gⱼ‖²/(2σᵢσⱼ), the gradients are those at the common start, and the size of the batches by which σ is measured is a hidden
temperature.

Ours has no temperature and no exchange besides the training itself. Weights are those of the least expected error

    E‖Σⱼ wⱼāⱼ − gᵢ‖² = Σⱼₖ wⱼwₖ⟨āⱼ, āₖ⟩ − 2 Σⱼ wⱼ⟨gⱼ, gᵢ⟩ + ‖gᵢ‖²,   wⱼ ≥ 0,  Σⱼ wⱼ = 1,

where gᵢ is what an endless round of owner i would change and āⱼ the mean change of owner j over all rounds so far. The noise of
two owners is independent, so for i ≠ j ⟨āᵢ, āⱼ⟩ has no bias; nor have two rounds of one owner, from which follows ‖gᵢ‖². Owners
who are alike share what they learn, owners who are not keep it, and nobody says which is the case. Weights are found anew after
every round, and hold for the changes of all rounds so far.

The server needs each owner's own change, so it cannot be used with secure aggregation. Do not use it for two rounds or fewer:
in the first one all train one adapter, as nothing is known of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgrove.stages.tune.gates import Looks

LOOKS: Looks = "changes"
OF_CLIENTS = True
CHOOSES = True
KEYS: frozenset[str] = frozenset()

STEPS = 20_000  # of the quadratic program, at most
ENOUGH = 1e-12  # of a weight: smaller steps end it


def weights(products: Tensor, squares: Tensor, rounds: Tensor, windows: Tensor) -> Tensor:
    """How much of each owner's mean change per round each owner gets: (owners, owners) float64; every row adds up to 1.

    An owner that was in fewer than two rounds has the weights of one adapter for all, by its windows.

    Args:
        products: of the owners' changes, each summed over its rounds, the inner products: (owners, owners) float64.
        squares: the squared norms of an owner's changes of single rounds, summed: (owners,) float64.
        rounds: how many rounds each owner was in: (owners,) int64.
        windows: of each owner, (owners,) float64.
    """
    heard = rounds > 0
    of_all = torch.where(heard, windows, 0.0)
    found = (of_all / of_all.sum()).expand(len(rounds), -1).clone()
    again = rounds > 1
    if not again.any():
        return found
    number = rounds[heard].double()
    means = products[heard][:, heard] / (number[:, None] * number)
    repeated = (products.diagonal() - squares)[heard] / (number * (number - 1)).clamp_min(1)
    signal = repeated.clamp_min(0).minimum(means.diagonal())
    wanted = means - torch.diag(means.diagonal() - signal)
    best = least(means, wanted, found[heard][:, heard])
    found[again.nonzero(), heard.nonzero()[:, 0]] = best[again[heard]]
    return found


def least(products: Tensor, wanted: Tensor, start: Tensor) -> Tensor:
    """Rows w of smallest w·products·w − 2·w·wanted, of numbers ≥ 0 that add up to 1: (owners, owners) float64.

    By projected gradients with Nesterov's momentum, which begins again where it leads upwards.

    Args:
        products: symmetric, without negative eigenvalues: (owners, owners) float64.
        wanted: the linear term of each row.
        start: where rows begin.
    """
    step = 1 / torch.linalg.matrix_norm(products, 2).clamp_min(torch.finfo(torch.float64).tiny)
    now = ahead = start
    pace = 1.0
    for _ in range(STEPS):
        after = on_simplex(ahead - step * (ahead @ products - wanted))
        upwards = ((ahead - after) * (after - now)).sum(1, keepdim=True) > 0
        following = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        ahead = torch.where(upwards, after, after + (pace - 1) / following * (after - now))
        moved, now, pace = float((after - now).abs().max()), after, following
        if moved < ENOUGH:
            break
    return now


def on_simplex(rows: Tensor) -> Tensor:
    """The nearest rows of numbers ≥ 0 that add up to 1."""
    sorted_, _ = rows.sort(1, descending=True)
    beyond = (sorted_.cumsum(1) - 1) / torch.arange(1, rows.shape[1] + 1)
    last = (sorted_ > beyond).sum(1, keepdim=True) - 1
    return (rows - beyond.gather(1, last)).clamp_min(0)
