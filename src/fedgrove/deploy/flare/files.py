"""The files that people write: ``federation.toml`` (who takes part), a site's ``site.toml``, the server's ``server.toml``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from fedgrove.errors import FedgroveError
from fedgrove.job import Bits, BitsPerSecond, Bytes, Files, Name, Part, Template, complaint, whole_pair

Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?:\d{1,5}$")]
SITE, SERVER, FEDERATION = "site.toml", "server.toml", "federation.toml"


def _folder(path: Path) -> Path:
    return path.expanduser()


Folder = Annotated[Path, AfterValidator(_folder)]
Models = dict[Name, Folder]


class Server(Part):
    """``[server]`` of a federation: the name that sites reach it by (it stands in its certificate) and its port."""

    host: Host = "localhost"
    port: Port = 8002


class Member(Part):
    """``[[sites]]``: an owner of text. ``connect``: HOST:PORT where it reaches the server by another way (a proxy)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    connect: Address | None = None


class Operator(Part):
    """``[[operators]]``: a person who may submit jobs; an e-mail address as name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+$", max_length=64)]


class Federation(Part):
    """``federation.toml``: who takes part. It holds no secret.

    Attributes:
        days: how long the root certificate of a new federation is valid; those of members: 360 days, at most as long.
        min_group: no sum of fewer sites is opened under secure aggregation.
    """

    name: Name
    server: Server = Server()
    sites: Annotated[tuple[Member, ...], Field(min_length=1)]
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


class Allow(Part):
    """``[allow]`` of a site: the site decides, the job asks.

    Attributes:
        stages: kinds of stages.
        methods: pruners, rules, scores and tuning methods by name; "all", or a list.
        group: takes part in no job of fewer sites.
        secure: answers only under secure aggregation.
        epsilon: answers only where noise of differential privacy is added, with at most this ε a stage.
        alone: tells what it would have had alone (perplexities).
        samples: the most calibration windows in a stage.
    """

    stages: tuple[Literal["prune", "structured", "tune"], ...] = ("prune", "structured", "tune")
    methods: Literal["all"] | tuple[Name, ...] = "all"
    group: Annotated[int, Field(ge=1)] = 2
    secure: bool = False
    epsilon: Annotated[float, Field(gt=0)] | None = None
    alone: bool = True
    samples: Annotated[int, Field(gt=0)] | None = None


class SiteFile(Part):
    """``site.toml``: a site's own, never sent. Paths are relative to its folder.

    Attributes:
        models: by the name that jobs use, where this site's copy is.
        data, text, prompt, answer, speed, uplink, downlink, bits: as in ``[[clients]]`` of a job.
        memory: what the planner may use.
        limit: the most memory that the working process may take; more is an error and not a killed machine.
        work: where hidden states lie while a run goes on.
        device: where it computes, such as "cuda:0".
        threads: of linear algebra; default: one a core.
        result: keep the finished model here, in ``results/``.
    """

    models: Models
    data: Files
    text: Template = None
    prompt: Template = None
    answer: Template = None
    memory: Bytes | None = None
    limit: Bytes | None = None
    speed: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["measure"] = 1.0
    uplink: BitsPerSecond | None = None
    downlink: BitsPerSecond | None = None
    bits: Annotated[tuple[Bits, ...], Field(min_length=1)] = (32, 16, 8, 4)
    work: Folder = Path("work")
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    result: bool = False
    allow: Allow = Allow()

    @field_validator("data", mode="before")
    @classmethod
    def _filled_in(cls, value: object) -> object:
        if value in ("", [], [""]):
            raise ValueError("write where this site's text lies")
        return value

    _whole_pair = model_validator(mode="after")(whole_pair)


class ServerFile(Part):
    """``server.toml``: the server's own.

    Attributes:
        models: by the name that jobs use, where the server's copy is.
        threads: of linear algebra; default: one a core.
        grace: seconds in which a site must fetch an ask; one that does not is missing, and is asked again the next time.
    """

    models: Models
    threads: Annotated[int, Field(ge=1)] | None = None
    grace: Annotated[float, Field(gt=0)] = 60.0


Own = TypeVar("Own", bound=Part)


def read(file: Path, kind: type[Own]) -> Own:
    """Reads one of these files; paths in it are relative to its folder.

    Raises:
        FedgroveError: names the file and the key.
    """
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
        return kind.model_validate(raw, context={"folder": file.parent.resolve()})
    except OSError as fault:
        raise FedgroveError(f"{file}: no such file; `fedgrove federation init` and `kits` write them") from fault
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise FedgroveError(f"{file}: not TOML: {fault}") from fault
    except ValidationError as fault:
        raise FedgroveError(f"{file}: {complaint(fault)}") from fault


def model_folder(models: Models, name: str, beside: Path) -> Path:
    """Where the model of that name is.

    Raises:
        FedgroveError: it is not listed, or not there.
    """
    if name not in models:
        raise FedgroveError(f'[models] has no {name!r}; add it: {name} = "/path/to/its/directory"')
    folder = beside / models[name]
    if not folder.is_dir():
        raise FedgroveError(f"models.{name}: no such directory: {folder}")
    return folder
