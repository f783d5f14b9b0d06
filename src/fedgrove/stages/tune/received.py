"""What a client checks of the changes that the server sends it, before its text passes through them.

In later rounds every client starts from the change so far, which the server sends. A model of the server's own choice could
make what the client then trains reveal the text. So a change has the parts, shapes and dtype that its request says, and the
weights with it keep the bound of :mod:`fedgrove.client.server_weights`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedgrove.client import server_weights
from fedgrove.client.local_client import LocalClient
from fedgrove.models.blocks import Decoder
from fedgrove.rounds.request import Tensors
from fedgrove.stages.tune.parametrizations import Trainable

OWN, REST = "own", "rest"  # kinds of tensors of a request: the part that a client trains, and the rest of the change

_norms: WeakKeyDictionary[Decoder, dict[str, float]] = WeakKeyDictionary()


def by_linear(tensors: Mapping[str, Tensor], kind: str = "") -> dict[str, Tensors]:
    """The parts of the changes of a kind, for each linear that has any.

    Args:
        tensors: ``<kind>/<linear>/<part>``, or without a kind ``<linear>/<part>``.
    """
    found: dict[str, Tensors] = {}
    prefix = f"{kind}/" if kind else ""
    for key, value in tensors.items():
        if key.startswith(prefix):
            name, _, part = key.removeprefix(prefix).rpartition("/")
            found.setdefault(name, {})[part] = value
    return found


def check_linears(named: Collection[str], known: Collection[str], client: LocalClient) -> None:
    """Refuses names of linears that the client's model does not have."""
    if not set(named) <= set(known):
        raise client.error("the request names linears that its model does not have; refused")


def check_parts(
    tensors: Tensors,
    method: Trainable,
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, Mapping[str, int]],
    dtypes: Collection[torch.dtype],
    shared_a: bool,
    client: LocalClient,
) -> None:
    """Refuses tensors that are no parts of a change.

    Args:
        tensors: ``<kind>/<linear>/<part>``.
        shapes: (out, in) of every linear of the client's model.
        ranks: by kind and linear, the largest rank; linears that are missing have the rank of a whole matrix at most.
        dtypes: that the parts may have.
        shared_a: all clients share one A, which is not sent.

    Raises:
        FedgroveError: names the first tensor that has no place, or another shape or dtype.
    """
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        kind, _, rest = key.partition("/")
        name, _, part = rest.rpartition("/")
        if kind not in ranks or name not in shapes:
            raise client.error(f"the server sent {key}, which is no part of a change; refused")
        found.setdefault((kind, name), {})[part] = tensor
    for (kind, name), parts in found.items():
        sent = {part: (tensor.shape, tensor.dtype) for part, tensor in parts.items()}
        sizes = {size for tensor in parts.values() for size in tensor.shape} if method.RANKED else {1}
        largest = ranks[kind].get(name, min(shapes[name])) if method.RANKED else 1
        fitting = [rank for rank in sizes if rank <= largest]
        if not any(sent == method.expected(shapes[name], rank, dtype, shared_a) for rank in fitting for dtype in dtypes):
            raise client.error(f"the server sent a change of {name} of another shape or dtype; refused")


def check_growth(method: Trainable, changes: Mapping[str, Any], decoder: Decoder, client: LocalClient) -> None:
    """Refuses changes that are not finite, or by which a weight matrix grows too much.

    Args:
        changes: by linear, the complete change of its weight.

    Raises:
        FedgroveError: names the first such linear.
    """
    for name, change in changes.items():
        parts = change.parts().values()
        if not any(part.numel() for part in parts):
            continue
        finite = all(bool(part.isfinite().all()) for part in parts)
        if finite and not method.RELATIVE:
            largest = change.largest_norm()
            if largest == 0 or largest <= (server_weights.GROWTH - 1) * _norm(decoder, name):
                continue  # by the triangle inequality, without forming the matrix
        before = decoder.read_matrix(name).float()
        server_weights.check_growth(name, before, method.merge(before, change, False), client)


def _norm(decoder: Decoder, name: str) -> float:
    """The Frobenius norm of a linear's weight, read once."""
    known = _norms.setdefault(decoder, {})
    if name not in known:
        known[name] = float(decoder.read_matrix(name).float().norm())
    return known[name]
