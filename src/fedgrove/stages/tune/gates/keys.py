"""A key for each member: a window goes to the key whose direction is nearest to its features (FedIns: Feng et al., ICCV 2023).

From the paper: members are chosen by the cosine of a frozen feature to keys, which move towards the features that chose them.
The chosen members are averaged without weights there, so the task gives keys no gradient: they are spherical k-means, found by
SGD and averaged by their index. Ours is exact: every exchange is a step of k-means over the windows of all clients, by sums of
whole numbers, and a key without windows begins again beside the largest. A window goes to one key, not to three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgrove.rounds.request import Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.gates import Looks, normal
from fedgrove.stages.tune.pool.scale import CODE, TOGETHER

if TYPE_CHECKING:
    from fedgrove.stages.tune.pool.config import Pool

LOOKS: Looks = "features"
OF_CLIENTS = False
CHOOSES = True
SAYS = "a mean cosine of {:.2f}"
KEYS = frozenset({"common", "blocks", "directions", "size", "prefix", "starts", "fit_rounds"})

BITS = 20  # of a cosine, after the binary point
HOLDS = 0.01  # a client holds a key that has this part of its windows
ASIDE = 0.1  # how far beside the largest key one without windows begins again


def begin(pool: Pool, size: int, seed: str) -> Tensors:
    """Directions drawn alike from all, the same at every client."""
    keys = normal((pool.starts, pool.most, size), f"{seed}/gate")
    return {"keys": _unit(keys)}


def specs(members: int, starts: int, size: int) -> TensorSpecs:
    """``keys`` (starts, members, size) float64."""
    return {"keys": (torch.Size([starts, members, size]), torch.float64)}


def is_valid(state: Tensors) -> bool:
    """Keys are unit vectors, or zeros after the first: no key."""
    squares, is_used = state["keys"].square().sum(2), used(state)
    return bool(((squares - 1).abs() < 1e-6)[is_used].all()) and bool(is_used[:, 0].all())


def used(state: Tensors) -> Tensor:
    """Which keys there are: (starts, members) bool."""
    return (state["keys"] != 0).any(2)


def observe(features: Tensor, state: Tensors) -> Tensors:
    """How many windows each key has, the sum of their directions, and of their cosines, for each start."""
    cosines, unit = cosines_of(features, state)
    best, chosen = cosines.max(1)
    one_hot = torch.nn.functional.one_hot(chosen, state["keys"].shape[1]).transpose(1, 2)
    counts = one_hot.sum(2)
    return {
        "counts": counts,
        "sums": one_hot @ CODE.encode(unit),
        "cosines": (best * 2.0**BITS).round().long().sum(1),
        "holders": (counts > HOLDS * len(features)).long(),
    }


def sums(members: int, starts: int, size: int) -> TensorSpecs:
    """int64: ``counts`` and ``holders`` (starts, members), ``sums`` (starts, members, size), ``cosines`` (starts,)."""
    shape = torch.Size([starts, members, size])
    shapes = {"counts": shape[:2], "sums": shape, "cosines": shape[:1], "holders": shape[:2]}
    return {name: (of, torch.int64) for name, of in shapes.items()}


def check(sums: Tensors, windows: int) -> None:
    """Refuses numbers of windows and sums of unit vectors that so many windows do not have."""
    counts = sums["counts"]
    if bool((counts < 0).any()) or bool((counts.double().sum(1) > windows).any()) or bool((sums["holders"] < 0).any()):
        raise WireError("its numbers of windows are out of range")
    if bool((sums["sums"].abs() > counts[:, :, None] * 2**CODE.fraction_bits).any()):
        raise WireError("its sums of directions are larger than its windows allow")
    if bool((sums["cosines"].double().abs() > counts.double().sum(1) * (2**BITS + 1)).any()):
        raise WireError("its cosines are out of range")


def settle(state: Tensors, sums: Tensors) -> tuple[Tensors, float]:
    """One step of k-means; the second value is the mean cosine of a window to its key, of the best start."""
    keys, counts = state["keys"].clone(), sums["counts"]
    moved = CODE.decode(sums["sums"])
    some = moved.square().sum(2) > 0
    keys[some] = moved[some]
    for start, member in (~some & used(state)).nonzero().tolist():
        aside = normal((keys.shape[2],), f"{start}/{member}")
        keys[start, member] = _unit(keys[start, int(counts[start].argmax())]) + ASIDE * _unit(aside)
    return {"keys": _unit(keys)}, float(means(sums["cosines"], sums).max())


def finish(state: Tensors, sums: Tensors, fewest: int) -> Tensors:
    """The best start's keys that enough clients hold, at least the one of most windows."""
    return held(state, sums, fewest, int(means(sums["cosines"], sums).argmax()))


def held(state: Tensors, sums: Tensors, fewest: int, start: int) -> Tensors:
    """The keys of a start that enough clients hold, at least the one of most windows."""
    members = sums["holders"][start] >= fewest
    members[sums["counts"][start].argmax()] = True
    return kept({"keys": state["keys"][start][None]}, members)


def kept(state: Tensors, members: Tensor) -> Tensors:
    """The keys of these members."""
    return {"keys": state["keys"][:, members].contiguous()}


def weights(features: Tensor, state: Tensors) -> Tensor:
    """1 for the nearest key."""
    cosines, _ = cosines_of(features, state)
    return torch.nn.functional.one_hot(cosines[0].argmax(0), cosines.shape[1]).double()


def surprise(features: Tensor, state: Tensors) -> Tensor:
    """1 − the cosine to the nearest key."""
    return 1 - cosines_of(features, state)[0][0].amax(0)


def cosines_of(features: Tensor, state: Tensors) -> tuple[Tensor, Tensor]:
    """(starts, members, windows), and the windows' directions (windows, size); added up feature by feature.

    Where there is no key, it is farther than any.
    """
    number, keys = len(features), state["keys"]
    columns = torch.nn.functional.pad(features.T, (0, -number % TOGETHER))
    squares, dots = torch.zeros(columns.shape[1], dtype=torch.float64), torch.zeros(*keys.shape[:2], columns.shape[1]).double()
    for feature in range(keys.shape[2]):
        squares = squares + columns[feature] * columns[feature]
        dots = dots + columns[feature] * keys[:, :, feature, None]
    length = squares.sqrt().clamp_min(1e-9)
    cosines = torch.where(used(state)[:, :, None], dots / length, -2.0)
    return cosines[:, :, :number], (columns / length).T[:number]


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-9)


def means(cosines: Tensor, sums: Tensors) -> Tensor:
    """The mean over windows of a sum of cosines, of each start."""
    return cosines.double() * 2.0**-BITS / sums["counts"].double().sum(1)
