"""A mixture of Gaussians of the windows' features, one for each member (FedGMM: Wu et al., ICML 2023).

From the paper: the gate is a density of the input with one component for each predictor, fitted by EM over clients, and an
owner has weights of its own over shared components. Ours: the M-step is exact. The paper's code averages the covariances of
clients, which loses how far their means are apart; here clients send Σγ, Σγx and Σγx² as whole numbers, so the fit is, bit for
bit, that of the pooled windows, whoever has which. Covariances are diagonal: over all windows, features are not correlated. The
gate is fitted before any training and then stays as it is; the losses of the members have no part in it.

Do not trust the density itself: it is overconfident in many dimensions, so weights are nearly 0 or 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgrove.rounds.request import Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.gates import Looks, normal
from fedgrove.stages.tune.pool.scale import CLIP, CODE, TOGETHER

if TYPE_CHECKING:
    from fedgrove.stages.tune.pool.config import Pool

LOOKS: Looks = "features"
OF_CLIENTS = False
CHOOSES = True
SAYS = "a mean log-likelihood of {:.2f} nats"
KEYS = frozenset({"common", "blocks", "directions", "size", "prefix", "starts", "fit_rounds"})

BITS = 20  # of γ and of a log-likelihood, after the binary point
LEAST_VARIANCE = 0.01  # of a component, where that of all windows is 1
HOLDS = 0.01  # a client holds a component that has this part of its windows
LOWEST = -1e6  # a log-likelihood per window that no clipped features fall below
PRIOR_STEPS = 50


def begin(pool: Pool, size: int, seed: str) -> Tensors:
    """Means drawn around 0, the mean of all windows, with variance 1; the same variances and shares.

    All clients begin with the same, so components cannot be swapped between them.
    """
    shape = (pool.starts, pool.most, size)
    means = normal(shape, f"{seed}/gate")
    shares = torch.full(shape[:2], 1 / pool.most, dtype=torch.float64)
    return {"means": means, "variances": torch.ones(shape, dtype=torch.float64), "shares": shares}


def specs(members: int, starts: int, size: int) -> TensorSpecs:
    """``means`` and ``variances`` (starts, members, size), ``shares`` (starts, members), float64."""
    shape = torch.Size([starts, members, size])
    return dict.fromkeys(("means", "variances"), (shape, torch.float64)) | {"shares": (shape[:2], torch.float64)}


def is_valid(state: Tensors) -> bool:
    """No component is narrower than a fit makes any, and shares add up to 1."""
    shares = state["shares"]
    narrow = bool((state["variances"] < LEAST_VARIANCE).any())
    return not narrow and bool((shares >= 0).all()) and bool(((shares.sum(1) - 1).abs() < 1e-6).all())


def observe(features: Tensor, state: Tensors) -> Tensors:
    """Σγ, Σγx, Σγx², Σ log p, and which components the client holds, for each start."""
    joint = _joint(features, state)
    total = _logsumexp(joint)
    gamma = _whole((joint - total[:, None]).exp())[:, :, : len(features)]
    x = CODE.encode(features)
    return {
        "counts": gamma.sum(2),
        "sums": gamma @ x,
        "squares": gamma @ x.square(),
        "likelihood": _whole(total[:, : len(features)]).sum(1),
        "holders": (gamma.sum(2) > HOLDS * len(features) * 2**BITS).long(),
    }


def sums(members: int, starts: int, size: int) -> TensorSpecs:
    """int64: ``counts`` and ``holders`` (starts, members), ``sums`` and ``squares`` (starts, members, size), ``likelihood``."""
    shape = torch.Size([starts, members, size])
    shapes = {"counts": shape[:2], "sums": shape, "squares": shape, "likelihood": shape[:1], "holders": shape[:2]}
    return {name: (of, torch.int64) for name, of in shapes.items()}


def check(sums: Tensors, windows: int) -> None:
    """Refuses negative numbers, more than the windows allow, and sums that no clipped features have."""
    counts, largest = sums["counts"], CLIP * 2**CODE.fraction_bits
    slack = 1 + windows * 2.0**-BITS * counts.shape[1]  # γ is rounded
    if bool((counts < 0).any()) or bool((counts.double().sum(1) > (windows + slack) * 2**BITS).any()):
        raise WireError("its weights of components are out of range")
    bound = counts.double()[:, :, None]
    if bool((sums["sums"].double().abs() > bound * largest).any()):
        raise WireError("its sums of features are larger than its weights allow")
    if bool((sums["squares"] < 0).any()) or bool((sums["squares"].double() > bound * largest**2).any()):
        raise WireError("its squares of features are larger than its weights allow")
    if bool((sums["likelihood"].double().abs() > windows * -LOWEST * 2**BITS).any()) or bool((sums["holders"] < 0).any()):
        raise WireError("its likelihood is out of range")


def settle(state: Tensors, sums: Tensors) -> tuple[Tensors, float]:
    """The M-step. A component without windows keeps its mean and variance, with share 0."""
    counts = sums["counts"].double()
    unit = 2.0**-CODE.fraction_bits
    some = (counts > 0)[:, :, None]
    divisor = counts.clamp_min(1)[:, :, None]
    means = sums["sums"].double() * unit / divisor
    variances = (sums["squares"].double() * unit**2 / divisor - means.square()).clamp_min(LEAST_VARIANCE)
    new = {
        "means": torch.where(some, means, state["means"]),
        "variances": torch.where(some, variances, state["variances"]),
        "shares": counts / counts.sum(1, keepdim=True),
    }
    return new, float(_likelihoods(sums).max())


def finish(state: Tensors, sums: Tensors, fewest: int) -> Tensors:
    """The start of the highest likelihood, with the components that enough clients hold, at least the largest of them."""
    best = int(_likelihoods(sums).argmax())
    members = (sums["holders"][best] >= fewest) & (state["shares"][best] > 0)
    members[state["shares"][best].argmax()] = True
    return kept({name: value[best][None] for name, value in state.items()}, members)


def kept(state: Tensors, members: Tensor) -> Tensors:
    """Shares still add up to 1."""
    found = {name: value[:, members].contiguous() for name, value in state.items()}
    return found | {"shares": found["shares"] / found["shares"].sum()}


def weights(features: Tensor, state: Tensors) -> Tensor:
    """γ of each window, with the shares that this owner's windows have: EM of the shares, with all else fixed."""
    shares = state["shares"]
    for _ in range(PRIOR_STEPS):
        joint = _joint(features, state | {"shares": shares})
        gamma = (joint - _logsumexp(joint)[:, None]).exp()[:, :, : len(features)]
        shares = gamma.mean(2)
    rows = gamma[0].T
    return (rows / rows.sum(1, keepdim=True)).contiguous()


def surprise(features: Tensor, state: Tensors) -> Tensor:
    """−log p of each window under the federation's mixture, divided by the number of features."""
    total = _logsumexp(_joint(features, state))[0, : len(features)]
    return -total / features.shape[1]


def _joint(features: Tensor, state: Tensors) -> Tensor:
    """log share + log density: (starts, members, windows, filled up to a multiple of ``TOGETHER``).

    Added up feature by feature, so that no window's value depends on how many others there are.
    """
    columns = torch.nn.functional.pad(features.T, (0, -len(features) % TOGETHER))
    means, variances = state["means"], state["variances"]
    starts, members, size = means.shape
    total = torch.zeros(starts, members, columns.shape[1], dtype=torch.float64)
    for feature in range(size):
        apart = columns[feature] - means[:, :, feature, None]
        total = total - apart * apart / (2 * variances[:, :, feature, None])
    constant = state["shares"].clamp_min(1e-300).log() - 0.5 * (variances.log() + math.log(2 * math.pi)).sum(2)
    return (total + constant[:, :, None]).clamp_min(LOWEST)


def _logsumexp(joint: Tensor) -> Tensor:
    """Over the members, one after the other: (starts, windows)."""
    largest = joint.amax(1)
    total = torch.zeros_like(largest)
    for member in range(joint.shape[1]):
        total = total + (joint[:, member] - largest).exp()
    return largest + total.log()


def _whole(values: Tensor) -> Tensor:
    return (values * 2.0**BITS).round().long()


def _likelihoods(sums: Tensors) -> Tensor:
    """The mean log-likelihood of a window, of each start."""
    return sums["likelihood"].double() / sums["counts"].double().sum(1)
