"""The first request of a run: does the site take part in this job, on this model?"""

from __future__ import annotations

import json
import time
from typing import Annotated, ClassVar

from pydantic import Field, ValidationError

from fedgrove.deploy.flare import ledger
from fedgrove.deploy.flare.files import model_folder
from fedgrove.deploy.flare.installation import Declared, Installation, SiteRequest, roster_number, torch_dtype
from fedgrove.deploy.flare.kits import name_of
from fedgrove.deploy.flare.leftovers import AGREED
from fedgrove.deploy.flare.policy import Digest, Terms, refused_key, terms_of
from fedgrove.engines.error_codes import Refusal
from fedgrove.errors import FedgroveError
from fedgrove.files import write_atomically
from fedgrove.job.load import load_federated
from fedgrove.job.units import Name, NonNegative
from fedgrove.models.digest import digests, first_difference
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.request import Disclosure, Reply, Response, Tensors

CLOCK = "log/clock.json"  # the server's time and this machine's, when the site was last asked to join


class Joined(Reply):
    """The site takes part.

    Attributes:
        result: whether it wants the finished model.
        capabilities: the capabilities that it declares.
    """

    result: bool
    capabilities: Declared


class JoinRun(SiteRequest):
    """Take part in the job that the operator signed; later requests are compared with its terms.

    Attributes:
        digests: hashes of the server's copy of the model, see :func:`fedgrove.models.digest.digests`.
        clock: the server's time, in seconds since 1970.
    """

    KIND: ClassVar[str] = "deploy/join"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.CAPABILITIES})
    REPLY: ClassVar[type[Reply]] = Joined

    digests: Annotated[dict[Name, Digest], Field(max_length=2**16)]
    clock: NonNegative

    def respond_at(self, tensors: Tensors, site: Installation) -> Response:
        kit, settings = site.kit, site.settings
        (kit / "log").mkdir(exist_ok=True)
        (kit / CLOCK).write_text(json.dumps({"server": self.clock, "here": time.time()}), encoding="utf-8")
        terms = self._terms(site)
        key = refused_key(settings.allow, terms, name_of(kit))
        if key is not None:
            raise Refusal("refused", key)
        if terms.secure:
            number, _ = roster_number(kit)
            if number != terms.roster:
                raise Refusal("roster", str(number))
            ledger.accept_roster(kit, number)
        try:
            path = model_folder(settings.models, terms.model, kit)
        except FedgroveError as error:
            raise Refusal("models") from error
        try:
            checkpoint = Checkpoint(path, torch_dtype(terms.dtype), shares=terms.shares)
        except FedgroveError as error:
            raise Refusal("model", "shares") from error
        different = first_difference(terms.digests, digests(checkpoint, kit / settings.work / f"digests-{terms.model}.json"))
        if different is not None:
            raise Refusal("model", different)
        ledger.spend(kit, terms, settings.allow.budget)
        write_atomically(site.folder / AGREED, terms.model_dump_json())
        return Response({}, Joined(result=settings.result, capabilities=site.declared()))

    def _terms(self, site: Installation) -> Terms:
        """The terms of the signed job; of a run that was joined before, the same as then."""
        try:
            terms = terms_of(load_federated(site.job, elsewhere=True), self.digests)
        except (FedgroveError, ValidationError) as error:
            raise Refusal("terms", "job") from error
        if (site.folder / AGREED).is_file() and agreed_terms(site) != terms:
            raise Refusal("terms", "job")
        return terms


def agreed_terms(site: Installation) -> Terms:
    """The terms that the site agreed to in this run.

    Raises:
        Refusal: it has not agreed to this run.
    """
    try:
        return Terms.model_validate_json((site.folder / AGREED).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise Refusal("joined") from error
