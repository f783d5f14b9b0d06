"""Responds to requests at a client: takes bytes, returns bytes. The text itself is never part of a response."""

from __future__ import annotations

import torch
from pydantic import ValidationError

from fedgrove import heap
from fedgrove.client.local_client import LocalClient
from fedgrove.escape import MAX_WORD, printable
from fedgrove.privacy.release import release_once
from fedgrove.rounds import wire
from fedgrove.rounds.exchanges.secagg import Masking
from fedgrove.rounds.request import Disclosure, Request, RequestError, Response, parse

HARMLESS = frozenset({Disclosure.CAPABILITIES})  # what a client sends unmasked even if it has credentials
UNMASKED = frozenset({"tokens"})  # what the JSON of a response may say beside masked tensors: the server knows it before


def serve(kind: str, message: bytes, client: LocalClient, device: str) -> bytes:
    """Responds to one request.

    Args:
        kind: the request's name on the wire.
        message: the request, packed by :func:`fedgrove.rounds.wire.pack`.
        client: the client's text, model, folder and keys.
        device: where it computes.

    Raises:
        WireError: the message is damaged, or not a request of that kind.
        FedgroveError: the client cannot respond, or refuses to.
    """
    return respond(*read(kind, message), client, device)


def read(kind: str, message: bytes) -> tuple[Request, dict[str, torch.Tensor], Masking | None]:
    """Unpacks a message: the request, the tensors sent with it, and the masking of the response (None: no masking).

    Raises:
        WireError: the message is damaged, not a request of that kind, or a tensor holds NaN or infinity.
    """
    tensors, info = wire.unpack(message)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RequestError(f"{kind}: {printable(name, MAX_WORD)} holds NaN or infinity", name)
    request = parse(kind, info.get("request"))
    masked = info.get("masking")
    try:
        masking = None if masked is None else Masking.model_validate(masked)
    except ValidationError as error:
        field = ".".join(map(str, ("masking", *error.errors()[0]["loc"])))
        raise RequestError(f"{kind}: {printable(field, MAX_WORD)}: {error.errors()[0]['msg']}", field) from error
    return request, tensors, masking


def respond(
    request: Request, tensors: dict[str, torch.Tensor], masking: Masking | None, client: LocalClient, device: str
) -> bytes:
    """Responds to a request that :func:`read` returned; see :func:`serve`."""
    if client.credentials is not None and masking is None and not request.discloses() <= HARMLESS:
        raise client.error(f"it responds to '{request.KIND}' only under secure aggregation")
    if masking is not None:
        masking.check(client, request, tensors)
    release = request.release()
    with torch.no_grad(), heap.limited(client.capabilities.get("memory")):
        if release is None:
            response = request.respond(tensors, client, device)
        else:  # a noisy response is made once and then repeated
            folder = client.records
            packed = release_once(folder, release, client.name, lambda: _plain(request.respond(tensors, client, device)))
            response = Response(packed[0], request.REPLY.model_validate(packed[1]))
    if masking is not None:
        _check_all_is_masked(request, response, client)
        response = Response(masking.apply(client, request.sum_name, response.tensors), response.reply)
    return pack(request, response)


def _check_all_is_masked(request: Request, response: Response, client: LocalClient) -> None:
    """Refuses a response under secure aggregation whose JSON, which travels as it is, says something of the text."""
    if response.reply.model_dump(exclude_none=True).keys() - UNMASKED:
        raise client.error(f"its response to '{request.KIND}' says more than its masked sums; refused")


def pack(request: Request, response: Response) -> bytes:
    """Packs a response, with the digest of its request, for the wire."""
    return wire.pack(response.tensors, {"request": request.digest, **response.reply.model_dump(mode="json")})


def _plain(response: Response) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    return dict(response.tensors), response.reply.model_dump(mode="json")
