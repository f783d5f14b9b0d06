"""Reads a job file: from TOML to a frozen :class:`~fedgrove.job.tables.Job`. Every error names the file and the key."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fedgrove.errors import FedgroveError
from fedgrove.job.tables import KINDS, FederatedJob, Job


def load(path: Path, changes: Sequence[str] = ()) -> Job:
    """Reads a job file; paths in it are relative to its folder.

    Args:
        path: the TOML file.
        changes: overrides of keys such as ``stages.0.sparsity=0.6``, applied before anything is checked.

    Raises:
        FedgroveError: the file cannot be read, or a key is wrong; names the file, the key and the remedy.
    """
    return _load(path, changes, Job, path.parent)


def load_federated(
    path: Path,
    changes: Sequence[str] = (),
    sites: Sequence[str] = (),
    texts: Path | None = None,
    *,
    elsewhere: bool = False,
) -> FederatedJob:
    """Reads a job file for a federation. There ``model.path`` is a name; each site's own file has the path.

    Args:
        path: the TOML file; if it has no ``[[clients]]``, all sites take part.
        changes: as for :func:`load`.
        sites: the names of the federation's sites.
        texts: the folder of the held-out texts; default: the folder of the job file.
        elsewhere: the held-out texts are on another machine, so it is not checked that they exist.

    Raises:
        FedgroveError: as for :func:`load`; also if a client is no site, or has a key other than its name.
    """
    return _load(path, changes, FederatedJob, texts or path.parent, sites, elsewhere)


def read_toml(path: Path, what: str = "file", remedy: str | None = None) -> dict[str, Any]:
    """The tables of a TOML file, which may begin with a byte order mark.

    Args:
        path: the file.
        what: what it is, for the message when it does not exist.
        remedy: what to do when it does not exist.

    Raises:
        FedgroveError: names the file and, where it is not UTF-8 or not TOML, the line.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise FedgroveError(f"{path}: no such {what}", remedy) from error
    except OSError as error:
        raise FedgroveError(
            f"{path}: it cannot be read ({error.strerror or type(error).__name__})", "make it readable for this user"
        ) from error
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise FedgroveError(f"{path}: not TOML: line {line} is not UTF-8", "save the file as UTF-8") from error
    except RecursionError as error:
        raise FedgroveError(f"{path}: not TOML: values are nested too deeply") from error
    except ValueError as error:  # besides TOMLDecodeError, such as for a number with thousands of digits
        raise FedgroveError(f"{path}: not TOML: {error}") from error


Kind = TypeVar("Kind", bound=Job)


def parse(said: Mapping[str, Any], folder: Path, where: str = "job") -> Job:
    """A job from the content of a job file.

    Args:
        said: the parsed TOML; not changed.
        folder: the folder that paths in it are relative to.
        where: the name of the job in error messages.

    Raises:
        FedgroveError: a key is wrong; names the key and the remedy.
    """
    raw = copy.deepcopy(dict(said))
    _find_model(raw, folder)
    return _validate(raw, Job, folder, where)


def _load(
    path: Path,
    changes: Sequence[str],
    kind: type[Kind],
    folder: Path,
    sites: Sequence[str] | None = None,
    elsewhere: bool = False,
) -> Kind:
    raw = read_toml(path, "job file", "`fedgrove init` writes one")
    for change in changes:
        _apply(raw, change)
    if sites is None:
        _find_model(raw, path.parent)
    else:
        _name_owners(raw, path, sites)
    return _validate(raw, kind, folder, str(path), elsewhere)


def _validate(raw: Mapping[str, Any], kind: type[Kind], folder: Path, where: str, elsewhere: bool = False) -> Kind:
    try:
        return kind.model_validate(raw, context={"folder": folder.resolve(), "elsewhere": elsewhere})
    except ValidationError as error:
        raise FedgroveError(f"{where}: {complaint(error)}") from error


def _find_model(raw: dict[str, Any], folder: Path) -> None:
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        sibling = folder / Path(model["path"]).expanduser()
        if sibling.is_dir():
            model["path"] = str(sibling.resolve())


def _name_owners(raw: dict[str, Any], path: Path, sites: Sequence[str]) -> None:
    clients = raw.setdefault("clients", [{"name": site} for site in sites])
    for i, client in enumerate(clients if isinstance(clients, list) else []):
        for key in client if isinstance(client, dict) else ():
            if key != "name":
                raise FedgroveError(
                    f"{path}: clients.{i}.{key}: in a federation each site sets this in its own file", "leave it out"
                )
        if sites and isinstance(client, dict) and client.get("name") not in sites:
            raise FedgroveError(
                f"{path}: clients.{i}.name: {client.get('name')!r} is no site of this federation",
                f"the sites are {', '.join(sites)}",
            )


# pydantic adds the union's member to a key's path
_ALTERNATIVE = re.compile(rf"literal\[.*|constrained-\w+|[A-Z]\w*|{'|'.join(KINDS)}")


def complaint(error: ValidationError) -> str:
    """The first error of a file as one line: the key, and what is wrong or allowed."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not _ALTERNATIVE.fullmatch(str(part)))
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "no such key"
    elif first["type"].startswith("union_tag"):  # the kind of a stage is missing or unknown
        where, what = f"{where}.kind", f"choose one of {', '.join(KINDS)}"
    elif first["type"] == "missing":
        what = "this key is required"
    elif first["type"] not in ("value_error", "string_pattern_mismatch") and isinstance(first["input"], str | int | float):
        what += f", not {first['input']!r}"
    elif first["type"] == "string_pattern_mismatch":
        what = f"{first['input']!r} is not of the form {first['ctx']['pattern']}"
    return f"{where}: {what}" if where else what


def _apply(raw: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key.strip():
        raise FedgroveError(f"--set {change}: write KEY=VALUE, for instance stages.0.sparsity=0.6")
    parsed: Any = value  # a value that is not TOML, such as a bare word, is a string
    with suppress(tomllib.TOMLDecodeError):
        table = tomllib.loads(f"value = {value}")
        parsed = table["value"] if len(table) == 1 else value
    place: Any = raw
    *path, last = key.strip().split(".")
    for step in path:
        if isinstance(place, list) and step.isdigit() and int(step) < len(place):
            place = place[int(step)]
        elif isinstance(place, dict) and (step in place or step in Job.model_fields):
            place = place.setdefault(step, {})
        else:
            raise FedgroveError(f"--set {key}: the job has no {step!r} there")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise FedgroveError(f"--set {key}: the job has no {last!r} there")
