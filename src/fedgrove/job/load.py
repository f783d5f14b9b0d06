"""Reads a job file: from TOML to a frozen :class:`~fedgrove.job.tables.Job`. Every error names the file and the key."""

from __future__ import annotations

import copy
import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from fedgrove.errors import FedgroveError
from fedgrove.job.federated import FederatedJob
from fedgrove.job.stage_config import config_of
from fedgrove.job.tables import KINDS, Job
from fedgrove.job.units import Table


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
        raise FedgroveError(f"{where}: {complaint(error, kind)}") from error


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


# pydantic adds the union's member to a key's path, and says that a key is wrong instead of its value
_ALTERNATIVE = re.compile(r"literal\[.*|constrained-\w+|\[key\]")
_PLAIN = {  # what pydantic says in words of Python
    "tuple_type": "write a list, in brackets",
    "dict_type": "write a table",
    "model_type": "write a table",
    "model_attributes_type": "write a table",
    "string_type": "write text, in quotes",
    "int_type": "write a whole number",
    "float_type": "write a number",
    "path_type": "write a path, in quotes",
    "missing": "this key is required",
}


def complaint(error: ValidationError, table: type[Table]) -> str:
    """The first error of a file as one line: the key, and what is wrong or allowed.

    Of a value that fits no member of a union, the error in the key farthest down is the one that its writer can mend.

    Args:
        table: what the file should be.
    """
    errors = error.errors()
    first, at = errors[0], _keys(errors[0]["loc"])
    same = [one for one in errors if _keys(one["loc"])[: len(at)] == at]
    deepest = max(len(_keys(one["loc"])) for one in same)
    if deepest > len(at):
        first = next(one for one in same if len(_keys(one["loc"])) == deepest)
        at, same = _keys(first["loc"]), [first]
    where = ".".join(at)
    what = ", or ".join(dict.fromkeys(_PLAIN.get(one["type"], one["msg"]) for one in same))
    what = what.removeprefix("Value error, ").replace(", or Input should be ", ", or ")
    if first["type"] == "extra_forbidden":
        what = f"no such key; {_instead(table, first['loc'])}"
    elif first["type"].startswith("union_tag"):  # the kind of a stage is missing or unknown
        where, what = f"{where}.kind", f"choose one of {', '.join(KINDS)}"
    elif first["type"] in ("too_short", "too_long"):
        bound, facts = ("at least", "min_length") if first["type"] == "too_short" else ("at most", "max_length"), first["ctx"]
        what = f"give {bound[0]} {facts[bound[1]]}, not {facts['actual_length']}"
    elif first["type"] == "string_pattern_mismatch":
        what = f"{first['input']!r} is not of the form {first['ctx']['pattern']}"
    elif first["type"] not in ("value_error", "missing") and isinstance(first["input"], str | int | float):
        what += f", not {first['input']!r}"
    return f"{where}: {what}" if where else what


def _keys(loc: Sequence[str | int]) -> list[str]:
    """The keys of an error's place, without the members of unions."""
    tag = 2 if loc[:1] == ("stages",) else -1  # the kind of a stage, which may also be the name of a key
    tables = {table.__name__ for table in Table.__subclasses__()}
    return [
        str(part)
        for place, part in enumerate(loc)
        if place != tag and part not in tables and not _ALTERNATIVE.fullmatch(str(part))
    ]


def _instead(table: type[Table], loc: Sequence[str | int]) -> str:
    """What to do about a key that a table does not have."""
    *path, key = loc
    tables = [table]
    if path[:1] == ["stages"] and len(path) > 2:
        tables = [config_of(str(path[2]))]
        kinds = [kind for kind in KINDS if len(path) == 3 and key in config_of(kind).model_fields]
        if kinds:
            return f"it belongs to kind = {' or '.join(json.dumps(kind) for kind in kinds)}"
        path = path[3:]
    for part in path:
        below = [one.model_fields[part].annotation for one in tables if part in one.model_fields]
        tables = [found for annotation in below for found in _tables_in(annotation)] or tables
    near = difflib.get_close_matches(str(key), [name for one in tables for name in (*one.model_fields, *one.SHORT_FORMS)], 1)
    return f"did you mean {near[0]}?" if near else "remove it"


def _tables_in(annotation: Any) -> list[type[Table]]:
    """The tables that a key may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return [annotation]
    return [table for part in get_args(annotation) for table in _tables_in(part)]


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
        if isinstance(place, list) and step.isdecimal() and int(step) < len(place):
            place = place[int(step)]
        elif isinstance(place, dict) and (step in place or step in Job.model_fields):
            place = place.setdefault(step, {})
        else:
            raise FedgroveError(f"--set {key}: the job has no {step!r} there")
    if isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise FedgroveError(f"--set {key}: the job has no {last!r} there")
