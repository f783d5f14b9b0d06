"""What a site allows. It compares a job with its ``site.toml`` before anything runs, and later each request with the
job.

The policy is an allow-list of request types. The name of a request on the wire starts with the kind of stage that it
belongs to. That stage must be part of the job that the site agreed to, and the request type checks its own fields
against the stage (:meth:`~fedgrove.rounds.request.Request.beyond`). A request that belongs to no stage is allowed only
if its response discloses nothing about a client's text. So a new type of request or kind of stage needs no change here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from fedgrove.client.hidden_states import Calibration
from fedgrove.client.serve import HARMLESS
from fedgrove.deploy.flare.files import Allow
from fedgrove.engines.error_codes import Refusal
from fedgrove.job.federated import FederatedJob
from fedgrove.job.stage_config import Agreed, StageConfig
from fedgrove.job.tables import KINDS, MAX_STAGES, AnyStage
from fedgrove.job.units import MAX_CLIENTS, ComputeDtype, CountOrZero, Name, Shares
from fedgrove.privacy.secagg.session import min_survivors
from fedgrove.rounds.request import Disclosure, Part, Request

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Terms(Part):
    """The parts of a job that a site has to agree to. The site reads them from the job that the operator signed.

    Attributes:
        name: the job's name.
        seed: the job's seed.
        model: the model's name; each site's ``site.toml`` says where its copy is.
        dtype: the dtype in which the model is read.
        shares: parameters of the model that share a stored tensor, as the job declares them.
        digests: hashes of the server's copy, see :func:`fedgrove.models.digest.digests`.
        stages: the job's stages.
        secure: whether sums are computed under secure aggregation.
        alone: whether clients report the losses of their own models (``evaluate.alone``).
        measured_in: the dtype in which they measure them (``evaluate.compute_dtype``).
        clients: the clients that may take part.
        roster: the number of the roster of their keys; 0 without secure aggregation.
    """

    name: Name
    seed: int
    model: Name
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    shares: Shares = Field(default_factory=dict)
    digests: Annotated[dict[Name, Digest], Field(max_length=2**16)]
    stages: Annotated[tuple[AnyStage, ...], Field(max_length=MAX_STAGES)]
    secure: bool
    alone: bool
    measured_in: ComputeDtype | None = None
    clients: Annotated[tuple[Name, ...], Field(max_length=MAX_CLIENTS)]
    roster: CountOrZero = 0

    def agreed_by(self, site: str) -> Agreed:
        """What requests to a site are compared with."""
        return Agreed(self.stages, self.seed, self.clients, site, self.secure, self.alone, self.measured_in)

    @property
    def digest(self) -> str:
        """A hash of the terms: the same for every run of the same job on the same model."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def spends(self) -> tuple[float, float]:
        """ε and δ of all stages together, by basic composition; infinite if a stage has no noise."""
        budgets = [stage.privacy_budget() for stage in self.stages]
        if self.alone or any(budget is None for budget in budgets):
            return math.inf, math.inf  # no noise is added to the losses of a client's own model either
        spent = [budget for budget in budgets if budget is not None]
        return sum(epsilon for epsilon, _ in spent), sum(delta for _, delta in spent)


def terms_of(job: FederatedJob, digests: Mapping[str, str]) -> Terms:
    """The terms of a job.

    Args:
        digests: of the server's copy of the model, see :func:`fedgrove.models.digest.digests`.
    """
    return Terms(
        name=job.name,
        seed=job.seed,
        model=job.model.path,
        dtype=job.model.dtype,
        shares=job.model.shares,
        digests=dict(digests),
        stages=job.stages,
        secure=job.privacy.secure_aggregation,
        alone=job.evaluate.measures_alone,
        measured_in=job.evaluate.compute_dtype,
        clients=tuple(client.name for client in job.clients),
        roster=job.roster,
    )


def refused_key(allow: Allow, terms: Terms, site: str) -> str | None:
    """The first key of ``[allow]`` that forbids the job; None: the site allows it. ``allow.group`` is about its own stages."""
    stages: tuple[StageConfig, ...] = terms.stages
    groups = [set(filter(stage.takes_part, terms.clients)) for stage in stages if stage.takes_part(site)]
    if any(stage.kind not in allow.stages for stage in stages):
        return "allow.stages"
    if allow.methods != "all" and any(not stage.methods() <= set(allow.methods) for stage in stages):
        return "allow.methods"
    if any(len(group) < allow.group for group in groups):
        return "allow.group"
    if allow.secure and not terms.secure:
        return "allow.secure"
    epsilon, delta = terms.spends()
    if allow.epsilon is not None:
        if not epsilon <= allow.epsilon or any(stage.noise_of_others(terms.secure) for stage in stages):
            return "allow.epsilon"
        if not delta <= allow.delta:
            return "allow.delta"
    if terms.alone and not allow.alone:
        return "allow.alone"
    windows = [stage.calibration_windows() for stage in stages]
    if allow.samples is not None and any(one is not None and one[0] > allow.samples for one in windows):
        return "allow.samples"
    return None


def check(allow: Allow, terms: Terms, request: Request, site: str, summed: int | None = None) -> None:
    """Refuses a request that is not part of the job that the site agreed to, or that the site no longer allows.

    Args:
        allow: the current settings: ``site.toml`` may have become stricter since the site agreed.
        terms: the terms that the site agreed to.
        site: its name.
        summed: the smallest number of clients whose masked responses can be summed; None: the response is not masked.

    Raises:
        Refusal: names the key of ``[allow]``, or the field of the request.
    """
    key = refused_key(allow, terms, site)
    if key is not None:
        raise Refusal("refused", key)
    room = request.KIND.partition("/")[0]
    if Disclosure.WINDOW_LOSSES in request.DISCLOSES and not terms.alone:
        raise Refusal("terms", "evaluate.alone")
    if not 0 <= request.stage < len(terms.stages):
        raise Refusal("terms", "stage")
    stage: StageConfig = terms.stages[request.stage]
    whole = terms.agreed_by(site)
    agreed = whole.of_stage(request.stage)
    if room in KINDS and not stage.takes_part(site):
        raise Refusal("terms", "clients")
    if room not in KINDS and not request.DISCLOSES <= HARMLESS:
        raise Refusal("terms", "kind")
    if room in KINDS and room != stage.kind:
        raise Refusal("terms", "kind")
    if request.round not in request.rounds_in(stage):
        raise Refusal("terms", "rounds")
    for calibration in _calibrations(request):
        if allow.samples is not None and calibration.samples > allow.samples:
            raise Refusal("refused", "allow.samples")
        field = _calibration_beyond(calibration, request, stage, agreed.seed_of(request.stage))
        if field is not None:
            raise Refusal("terms", field)
    field = request.beyond(agreed if room in KINDS else whole)
    if field is not None:
        raise Refusal("terms", field)
    if summed is None:
        summed = 1 if terms.secure else min_survivors(len(agreed.clients))
    if request.adders() > summed:
        raise Refusal("terms", "noise")


def _calibration_beyond(calibration: Calibration, request: Request, stage: StageConfig, seed: str) -> str | None:
    """The first field of a request's calibration that is not as in the agreed stage.

    Fewer windows or another seed are refused, too: sums over one window, or over windows that overlap in all but one,
    would reveal that window.
    """
    samples, length = stage.calibration_windows() or (0, 0)
    if calibration.stage != request.stage:
        return "stage"
    if calibration.round != request.round:
        return "round"
    if calibration.length != length:
        return "length"
    if calibration.samples != samples:
        return "samples"
    return "seed" if calibration.seed != seed else None


def _calibrations(value: object) -> Iterator[Calibration]:
    """Every calibration in a request, at any depth."""
    if isinstance(value, Calibration):
        yield value
    elif isinstance(value, BaseModel):
        for _, part in value:
            yield from _calibrations(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _calibrations(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _calibrations(part)
