"""Finds methods by file name: a method is a file, and its file name is its name in the job. There is no other registry.

A kind of stage is a folder of ``fedgrove.stages``. Every other method (a pruner, an aggregation, a planner, an export)
is a file in a package. The package's ``__init__`` may define ``METHOD``, the protocol that its files have to implement:
a file that lacks part of it is refused with a one-line error when it is loaded.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fedgrove.errors import FedgroveError


def names(package: str, folders: bool = False) -> list[str]:
    """The names of the methods in a package of fedgrove, such as "stages.prune.pruners", sorted; imports none of them.

    Args:
        package: the package, without "fedgrove.".
        folders: list the subpackages instead of the files.
    """
    path = importlib.import_module(f"fedgrove.{package}").__path__
    return list(_names(tuple(path), tuple(Path(folder).stat().st_mtime_ns for folder in path), folders))


@cache  # a job is checked against them at every key that names a method
def _names(path: tuple[str, ...], changed: tuple[int, ...], folders: bool) -> list[str]:
    """The names in these folders, which were changed at these times."""
    return sorted(module.name for module in pkgutil.iter_modules(path) if module.ispkg == folders)


def load(package: str, name: str, protocol: Any = None) -> ModuleType:
    """Imports the file of one method.

    Only names that :func:`names` lists are imported, because ``name`` may come from a network.

    Args:
        package: the package, without "fedgrove.".
        name: the method.
        protocol: the protocol that the file has to implement; default: the package's ``METHOD``, if it has one.

    Raises:
        FedgroveError: there is no such method, or its file lacks part of the protocol.
    """
    return _load(package, tuple(importlib.import_module(f"fedgrove.{package}").__path__), name, protocol)


@cache  # a method is looked up for every message and every matrix
def _load(package: str, path: tuple[str, ...], name: str, protocol: Any) -> ModuleType:
    """:func:`load` of a package whose folders these are."""
    if name not in names(package):
        raise FedgroveError(f"{package}: there is no {name!r} here", f"choose one of {', '.join(names(package))}")
    module = importlib.import_module(f"fedgrove.{package}.{name}")
    protocol = protocol or getattr(importlib.import_module(f"fedgrove.{package}"), "METHOD", None)
    lacking = _lacking(module, protocol) if protocol is not None else None
    if lacking:
        raise FedgroveError(
            f"{module.__file__}: it lacks {lacking}, which {protocol.__module__}.{protocol.__name__} requires", "add it"
        )
    return module


def _lacking(module: ModuleType, protocol: Any) -> str | None:
    """The first attribute, function or parameters of a protocol that a file lacks; None: it has all of them."""
    bases = [base for base in reversed(protocol.__mro__) if base is not object]
    for attribute in [name for base in bases for name in vars(base).get("__annotations__", {})]:
        if not hasattr(module, attribute):
            return f"{attribute}"
    for name, asked in [item for base in bases for item in vars(base).items()]:
        if name.startswith("_") or not inspect.isfunction(asked):
            continue
        given = getattr(module, name, None)
        if not callable(given):
            return f"the function {name}"
        parameters = list(inspect.signature(asked).parameters)[1:]  # without self
        try:
            inspect.signature(given).bind(*parameters)
        except TypeError:
            return f"the parameters {', '.join(parameters)} of {name}"
    return None
