"""Modules that are imported on first use, so that commands that do not need them start quickly."""

from __future__ import annotations

import importlib
from typing import Any


class lazy:
    """A proxy of the module ``fedgrove.<name>``, which is imported when one of its attributes is read.

    ``importlib.util.LazyLoader`` cannot be used: it puts an empty module into ``sys.modules``, and code that inspects
    all modules, such as the import of torch, would load that module in the middle of another import.
    """

    def __init__(self, name: str):
        self._name = f"fedgrove.{name}"

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
