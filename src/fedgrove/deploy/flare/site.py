"""Responds to requests at a site, in its working process: takes bytes, returns bytes or an error code."""

from __future__ import annotations

import resource
import traceback
from functools import lru_cache
from pathlib import Path

from fedgrove.client import serve
from fedgrove.deploy.flare import ledger, policy
from fedgrove.deploy.flare.exchanges.join import agreed_terms
from fedgrove.deploy.flare.files import SITE, SiteFile, read
from fedgrove.deploy.flare.installation import Installation, SiteRequest
from fedgrove.deploy.flare.kits import name_of
from fedgrove.deploy.flare.upkeep import RUN_NAME, write_log
from fedgrove.engines import error_codes
from fedgrove.engines.error_codes import Refusal
from fedgrove.engines.worker import Reply
from fedgrove.errors import FedgroveError
from fedgrove.escape import MAX_WORD, printable
from fedgrove.files import private_files
from fedgrove.rounds.request import RequestError


def respond(kit: Path, run: str, kind: str, message: bytes, job: Path) -> Reply:
    """Responds to one request. Of an error, only its code (:mod:`fedgrove.engines.error_codes`) is sent.

    Args:
        kit: the site's folder.
        run: the name of the folder with the run's working files.
        kind: the request's name on the wire, see :mod:`fedgrove.rounds.request`.
        message: the request, packed by :func:`fedgrove.rounds.wire.pack`.
        job: the job file that the operator signed.

    Returns:
        (response, None) or (None, error code).
    """
    reply: Reply
    with private_files():
        try:
            reply = _respond(kit, run, kind, message, job), None
        except Exception as error:
            reply = None, error_codes.encode_exception(error)
            write_log(kit, traceback.format_exc())
    response, code = reply
    result = code if response is None else f"{len(response)} bytes out"
    write_log(kit, f"{printable(run, MAX_WORD)} {printable(kind, MAX_WORD)}: {len(message)} bytes in, {result}")
    return reply


def _respond(kit: Path, run: str, kind: str, message: bytes, job: Path) -> bytes:
    if not RUN_NAME.fullmatch(run):
        raise Refusal("terms", "run")
    try:
        settings = read(kit / SITE, SiteFile)
    except FedgroveError as error:
        raise Refusal("site-file") from error
    _limit_memory(settings.limit)
    site = Installation(kit, settings, run, job)
    try:
        request, tensors, masking = serve.read(kind, message)
    except RequestError as error:
        raise Refusal("terms", error.field) from error
    if isinstance(request, SiteRequest):
        return serve.pack(request, request.respond_at(tensors, site))
    terms = agreed_terms(site)
    summed = None if masking is None else masking.session.quorum
    policy.check(settings.allow, terms, request, name_of(kit), summed)
    client = site.client(terms.model, terms.dtype, terms.secure, ledger.releases(kit, terms), terms.shares)
    return serve.respond(request, tensors, masking, client, settings.device)


@lru_cache(maxsize=1)
def _limit_memory(most: int | None) -> None:
    """Limits this process to that many bytes of memory: allocations beyond that fail. None: no limit."""
    if most is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
