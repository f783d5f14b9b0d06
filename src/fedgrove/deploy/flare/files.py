"""The files that people write: ``federation.toml`` (who takes part), a site's ``site.toml``, the server's ``server.toml``."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from fedgrove.errors import FedgroveError
from fedgrove.job.endpoint import Endpoint
from fedgrove.job.load import complaint, read_toml
from fedgrove.job.tables import KINDS, whole_pair
from fedgrove.job.units import BitChoices, BitsPerSecond, Bytes, Files, Name, Positive, Speed, Table, Template


def is_ipv6(host: str) -> bool:
    """Whether a text is an IPv6 address, with or without brackets and a zone."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]").partition("%")[0]).version == 6
    except ValueError:
        return False


def _no_ipv6(host: object) -> object:
    """Refuses an IPv6 address: FLARE splits HOST:PORT at the first colon, and its server listens on IPv4 only."""
    if isinstance(host, str) and is_ipv6(host):
        raise ValueError(f"{host!r} is an IPv6 address, which NVIDIA FLARE cannot use; write a host name or an IPv4 address")
    return host


def _no_ipv6_address(address: object) -> object:
    if isinstance(address, str):
        _no_ipv6(address)
        _no_ipv6(address.rpartition(":")[0])
    return address


Host = Annotated[str, BeforeValidator(_no_ipv6), Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Address = Annotated[str, BeforeValidator(_no_ipv6_address), Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?:\d{1,5}$")]
SITE, SERVER, FEDERATION = "site.toml", "server.toml", "federation.toml"
JOB = "job.toml"  # of a submitted job, in the app of the server and in that of the sites


def _folder(path: Path) -> Path:
    return path.expanduser()


def _stage_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"choose one of {', '.join(KINDS)}")
    return kind


Folder = Annotated[Path, AfterValidator(_folder)]
StageKind = Annotated[str, AfterValidator(_stage_kind)]
Models = dict[Name, Folder]


class Server(Table):
    """``[server]`` of a federation: the name by which sites reach it (part of its certificate) and its port."""

    host: Host = "localhost"
    port: Port = 8002


class Site(Table):
    """``[[sites]]``: an installation at an organisation that owns text.

    Attributes:
        name: the name in its certificate and of its client.
        connect: HOST:PORT by which the site reaches the server instead, such as a proxy.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    connect: Address | None = None


class Operator(Table):
    """``[[operators]]``: a person who may submit jobs; an e-mail address as name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+$", max_length=64)]


class Federation(Table):
    """``federation.toml``: the participants. It contains no secret.

    Attributes:
        days: how many days the root certificate of a new federation is valid. Other certificates: 360 days, at most as
            long.
        min_group: the fewest sites whose sum may be opened under secure aggregation.
    """

    name: Name
    server: Server = Server()
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]
    operators: Annotated[tuple[Operator, ...], Field(min_length=1)]
    days: Annotated[int, Field(ge=1, le=7300)] = 1080
    min_group: Annotated[int, Field(ge=2)] = 3

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = ["server", self.server.host, *(site.name for site in self.sites), *(person.name for person in self.operators)]
        for name in names:
            if [other.lower() for other in names].count(name.lower()) > 1 and name != "server":
                raise ValueError(f"the name {name!r} is given twice")
        return self


class Allow(Table):
    """``[allow]`` of a site: what a job may require of the site; see :mod:`fedgrove.deploy.flare.policy`.

    Attributes:
        stages: the allowed kinds of stages.
        methods: the allowed pruners, aggregations, allocations, scores and tuning methods by name; "all", or a list.
        group: the fewest sites of a stage that this site takes part in.
        secure: respond only under secure aggregation.
        epsilon: respond only with differential privacy, with at most this ε for all stages of a job together, and only
            if this site's response alone, or its masked share of a sum, has the noise.
        delta: the largest δ for all stages of a job together, if ``epsilon`` is set.
        budget: the largest ε of all jobs together that this site has ever joined; default: any.
        alone: allow jobs to request the loss of this site's own model on each window of held-out text.
        samples: the largest number of calibration windows in a stage.
    """

    stages: tuple[StageKind, ...] = KINDS
    methods: Literal["all"] | tuple[Name, ...] = "all"
    group: Annotated[int, Field(ge=1)] = 2
    secure: bool = False
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    alone: bool = True
    samples: Annotated[int, Field(gt=0)] | None = None


class SiteFile(Table):
    """``site.toml``: the settings of a site; the file is never sent. Paths are relative to its folder.

    Attributes:
        models: for each name that jobs use, the folder of this site's copy.
        data, text, prompt, answer, speed, uplink, downlink, bits: as in ``[[clients]]`` of a job.
        memory: bytes that the planner may use.
        limit: bytes that the working process may allocate; above that it gets an error, so the machine stays up.
        work: the folder for working files of a run, such as hidden states.
        keep: days after which a start removes the working files of runs that died.
        device: where it computes, such as "cuda:0".
        threads: number of threads for linear algebra; default: one per core.
        result: keep the finished model here, in ``results/``.
        endpoint: a completions server that runs the model in this site's place, in stages of kind "prompt", and so sees this
            site's text. Nobody else can name it.
    """

    models: Models
    data: Files
    text: Template = None
    prompt: Template = None
    answer: Template = None
    memory: Bytes | None = None
    limit: Bytes | None = None
    speed: Speed | Literal["measure"] = 1.0
    uplink: BitsPerSecond | None = None
    downlink: BitsPerSecond | None = None
    bits: BitChoices = (32, 16, 8, 4)
    work: Folder = Path("work")
    keep: Annotated[float, Field(ge=0, le=36500)] = 7
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    result: bool = False
    endpoint: Endpoint | None = None
    allow: Allow = Allow()

    @field_validator("data", mode="before")
    @classmethod
    def _filled_in(cls, value: object) -> object:
        if value in ("", [], [""]):
            raise ValueError("write where this site's text is")
        return value

    _whole_pair = model_validator(mode="after")(whole_pair)


class ServerFile(Table):
    """``server.toml``: the settings of the server.

    Attributes:
        models: for each name that jobs use, the folder of the server's copy.
        device: where the server computes, such as "cuda:0".
        threads: number of threads for linear algebra; default: one per core.
        tasks: the tasks of lm-evaluation-harness that jobs may name in ``evaluate.tasks``.
        grace: seconds in which a site must fetch a request; otherwise it is skipped until the next request.
    """

    models: Models
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    tasks: tuple[str, ...] = ()
    grace: Positive = 60.0


File = TypeVar("File", bound=Table)


def read(path: Path, kind: type[File]) -> File:
    """Reads one of these files; paths in it are relative to its folder.

    Raises:
        FedgroveError: names the file and the key.
    """
    raw = read_toml(path, remedy="`fedgrove federation init` and `kits` write them")
    try:
        return kind.model_validate(raw, context={"folder": path.parent.resolve()})
    except ValidationError as error:
        raise FedgroveError(f"{path}: {complaint(error, kind)}") from error


def model_folder(models: Models, name: str, kit: Path) -> Path:
    """The folder of the model of that name.

    Args:
        models: ``[models]`` of a file; paths are relative to the kit.

    Raises:
        FedgroveError: the model is not listed, or its folder does not exist.
    """
    if name not in models:
        raise FedgroveError(f"[models] has no {name!r}", f'add it: {name} = "/path/to/its/directory"')
    folder = kit / models[name]
    if not folder.is_dir():
        raise FedgroveError(f"models.{name}: no such directory: {folder}")
    return folder
