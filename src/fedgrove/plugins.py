"""A method is a file, and its file name is its name in the job: that is the whole registry."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from fedgrove.errors import FedgroveError


def names(package: str) -> list[str]:
    """The methods that stand in a package of fedgrove, e.g. ``names("pruners")``; imports none of them."""
    folder = importlib.import_module(f"fedgrove.{package}").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.ispkg)


def load(package: str, name: str) -> ModuleType:
    """The file of one method.

    Raises:
        FedgroveError: there is no such method; the name may come from the network, so nothing else is imported by it.
    """
    if name not in names(package):
        raise FedgroveError(f"{package}: there is no {name!r} here; choose one of {', '.join(names(package))}")
    return importlib.import_module(f"fedgrove.{package}.{name}")
